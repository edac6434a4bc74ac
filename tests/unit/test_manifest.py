"""A manifest says which files make a split, and every mistake in it is found and named."""

import numpy as np
import pytest
import soundfile

from fairseq_stack.data.manifest import (
    check_manifest,
    missing_files,
    read_manifest,
    read_manifests,
    write_manifest,
)
from fairseq_stack.errors import InputError


def write_text(folder, text):
    path = folder / "train.tsv"
    path.write_text(text.replace("ROOT", str(folder)))
    return path


def test_a_manifest_gives_root_paths_lengths_and_utterances(tmp_path):
    manifest = read_manifest(write_text(tmp_path, "ROOT\nspeaker/a.b.flac\t16000\nc.wav\t1\n"))
    assert manifest.root == str(tmp_path)
    assert list(manifest.paths) == ["speaker/a.b.flac", "c.wav"]
    assert manifest.samples.dtype == np.int64 and manifest.samples.tolist() == [16000, 1]
    assert len(manifest) == 2
    assert [manifest.utterance(index) for index in range(2)] == ["speaker/a.b", "c"]
    assert manifest.path(0) == f"{tmp_path}/speaker/a.b.flac"


def test_windows_line_ends_are_understood(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(f"{tmp_path}\r\na.wav\t5\r\n".encode())
    assert read_manifest(path).samples.tolist() == [5]


@pytest.mark.parametrize("text, encoding", [
    ("ROOT\na/b.wav\t3\nc.wav\t4\n", "utf-8-sig"),
    ("ROOT\r\na/b.wav\t3\r\nc.wav\t4\r\n", "utf-16"),  # with a mark, as Windows' shell redirects
    ("ROOT\nROOT/a/b.wav\t3\n./c.wav\t4\n", "utf-8"),
    ("ROOT/\nROOT//a/./b.wav\t3\nx/../c.wav\t4", "utf-8"),
    ("ROOT \na//b.wav\t3 \nROOT/x/../c.wav\t4\n\n  \n", "utf-8"),
    ("LINK\nROOT/a/b.wav\t3\nLINK/c.wav\t4\n", "utf-8"),
])  # fmt: skip
def test_what_editors_and_other_programs_write_is_understood(tmp_path, text, encoding):
    root, link = tmp_path / "root", tmp_path / "link"
    root.mkdir(), link.symlink_to(root)
    path = tmp_path / "train.tsv"
    path.write_bytes(text.replace("ROOT", str(root)).replace("LINK", str(link)).encode(encoding))
    manifest = read_manifest(path)
    assert list(manifest.paths) == ["a/b.wav", "c.wav"] and manifest.samples.tolist() == [3, 4]
    assert manifest.path(0) in (f"{root}/a/b.wav", f"{link}/a/b.wav")


@pytest.mark.parametrize("again", ["./a/b.flac", "a//b.wav", "ROOT/a/b.wav", "a/c/../b.wav"])
def test_an_utterance_under_two_spellings_is_found(tmp_path, again):
    path = write_text(tmp_path, f"ROOT\nx.wav\t1\na/b.wav\t1\n{again}\t1\n")
    with pytest.raises(InputError, match=r":4: the utterance 'a/b' is listed before, in line 3; correct"):
        read_manifest(path)


def test_several_manifests_are_one_below_the_folder_they_share(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.tsv").write_text(f"{tmp_path / name}\nx.wav\t{ord(name)}\n")
    (tmp_path / "c.tsv").write_text(f"{tmp_path}\nb/x.flac\t5\n")
    manifest = read_manifests([tmp_path / "a.tsv", tmp_path / "b.tsv"])
    assert manifest.root == str(tmp_path) and list(manifest.paths) == ["a/x.wav", "b/x.wav"]
    assert manifest.samples.tolist() == [97, 98]
    with pytest.raises(InputError, match=r"c\.tsv: the utterance 'b/x' is listed in .*b\.tsv too"):
        read_manifests([tmp_path / "a.tsv", tmp_path / "b.tsv", tmp_path / "c.tsv"])


@pytest.mark.parametrize(
    "text, line, problem",
    [
        ("\ufeff", None, "is empty"),
        ("\ufeffROOT/absent\na.wav\t1\n", 1, "absent' does not exist"),
        ("ROOT\nROOTx/a.wav\t1\n", 2, "does not lie below the root"),
        ("", None, "is empty"),
        ("ROOT/absent\na.wav\t1\n", 1, "does not exist"),
        ("\na.wav\t1\n", 1, "does not exist"),
        ("ROOT\n", None, "lists no files"),
        ("ROOT\na.wav\t1\nb.wav 2\n", 3, "'b.wav 2' is not a path, a tab and a number"),
        ("ROOT\na.wav\t1\n\nb.wav\t2\n", 3, "'' is not a path"),
        ("ROOT\n\t7\n", 2, "is not a path"),
        ("ROOT\na.wav\t1\t2\n", 2, "is not a positive whole number"),
        ("ROOT\na.wav\t1.5\n", 2, "'1.5' is not a positive whole number"),
        ("ROOT\na.wav\t\n", 2, "'' is not a positive whole number"),
        ("ROOT\na.wav\t0\n", 2, "'0' is not a positive"),
        ("ROOT\na.wav\t-3\n", 2, "'-3' is not a positive"),
        ("ROOT\na.wav\t\u0663\n", 2, "is not a positive whole number"),
        ("ROOT\na.wav\t" + "9" * 5000 + "\n", 2, "is not a positive whole number"),
        ("ROOT\n/etc/a.wav\t1\n", 2, "does not lie below the root"),
        ("ROOT\nb/../../a.wav\t1\n", 2, "does not lie below the root"),
        ("ROOT\na.wav\t1\nb.wav\t1\na.wav\t1\n", 4, "'a' is listed before"),
        ("ROOT\na.wav\t1\na.flac\t1\n", 3, "'a' is listed before"),
        ("RIFF\0\0\0\0WAVE", None, "is not a text file"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, line, problem):
    path = write_text(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert problem in message and "\n" not in message


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.tsv: cannot read"):
        read_manifest(tmp_path / "absent.tsv")


def test_files_count_as_missing_unless_they_can_be_opened(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "there.wav").touch()
    (tmp_path / "a" / "linked.wav").symlink_to("there.wav")
    (tmp_path / "a" / "dangling.wav").symlink_to("nowhere.wav")
    (tmp_path / "a" / "folder.wav").mkdir()
    names = ["z/gone.wav", "a/there.wav", "a/linked.wav", "a/dangling.wav", "a/folder.wav", "gone.wav"]
    write_manifest(tmp_path / "train.tsv", tmp_path, [(name, 1) for name in names])
    assert missing_files(read_manifest(tmp_path / "train.tsv")) == [
        "z/gone.wav",
        "a/dangling.wav",
        "a/folder.wav",
        "gone.wav",
    ]


def test_what_is_written_is_read_again_even_if_a_name_is_not_utf8(tmp_path):
    name = b"caf\xe9 \xc3\xa9 \xe2\x80\xa8.wav".decode("utf-8", "surrogateescape")
    write_manifest(tmp_path / "train.tsv", tmp_path, [(name, 3), ("b.wav", 4)])
    assert (tmp_path / "train.tsv").read_bytes() == (
        str(tmp_path).encode() + b"\ncaf\xe9 \xc3\xa9 \xe2\x80\xa8.wav\t3\nb.wav\t4\n"
    )
    manifest = read_manifest(tmp_path / "train.tsv")
    assert list(manifest.paths) == [name, "b.wav"]


@pytest.mark.parametrize("entries", [[], [("a.wav", 1), ("b\tc.wav", 1)], [("b\nc.wav", 1)]])
def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path, entries):
    path = write_text(tmp_path, "ROOT\nold.wav\t1\n")
    with pytest.raises(InputError):
        write_manifest(path, tmp_path, entries)
    assert list(read_manifest(path).paths) == ["old.wav"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.tsv"]


def test_check_reports_each_damage_and_nothing_else(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)

    def audio(name, samples=noise, rate=16_000, **kind):
        soundfile.write(tmp_path / name, samples, rate, **kind)
        return (tmp_path / name).read_bytes()

    audio("good.flac"), audio("good too.wav")
    audio("longer.wav", noise[:4000])
    audio("rate.wav", rate=8_000)
    audio("stereo.wav", np.stack([noise, noise], axis=1))
    audio("empty.wav", noise[:0])
    audio("nan.wav", np.where(np.arange(8000) == 7999, np.nan, noise), subtype="FLOAT")
    whole = audio("cut.flac")
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bit.flac").write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    (tmp_path / "text.wav").write_text("not audio")
    damages = {
        "gone.wav": "No such file",
        "longer.wav": "has 4000 samples",
        "rate.wav": "8000 Hz",
        "stereo.wav": "2 channel(s)",
        "empty.wav": "no samples",
        "nan.wav": "not finite",
        "cut.flac": "",
        "bit.flac": "",
        "text.wav": "cannot be read as audio",
        "short.wav": "one frame takes 400",
    }
    audio("short.wav", noise[:399])
    names = ["good.flac", *damages, "good too.wav"]
    write_manifest(tmp_path / "test.tsv", tmp_path, [(name, 399 if name == "short.wav" else 8000) for name in names])
    problems = check_manifest(tmp_path / "test.tsv", shortest=400)
    assert [problem.split(":")[0] for problem in problems] == [f"{tmp_path}/{name}" for name in damages]
    for problem, words in zip(problems, damages.values()):
        assert words in problem and "\n" not in problem
