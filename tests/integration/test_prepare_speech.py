"""Whatever the source, the output is 16 kHz mono audio whose manifests fairseq reads as they are."""

import csv
import gzip
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fairseq.data.audio.hubert_dataset import load_audio
from torchaudio.functional import resample as torchaudio_resample

from fairseq_stack.cli import main
from fairseq_stack.data import prepare as prepare_module
from fairseq_stack.data.debian import ASTERISK, OTHERS, asterisk_recordings, debian_recordings, fetch_packages
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.prepare import check_speech, prepare, prepare_recordings, with_texts
from fairseq_stack.data.recordings import Recording
from fairseq_stack.data.splits import choose_splits
from fairseq_stack.errors import InputError

ROOT = Path(__file__).parents[2]


def tone(rate, hertz=440.0, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def noise(seed, samples=1600):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, samples)


def write(path, samples, rate=16_000, **kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **kind)
    return path


def listed(output):
    """{utterance: (split, path of the file, samples)}, read by fairseq's own code."""
    found = {}
    for split in ("train", "valid", "test"):
        if (output / f"{split}.tsv").exists():
            root, names, _, _, sizes = load_audio(output / f"{split}.tsv", None, None)
            for name, size in zip(names, sizes):
                assert os.path.splitext(name)[0] not in found
                found[os.path.splitext(name)[0]] = split, Path(root, name), size
    return found


def labels(output):
    with open(output / "labels.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert list(rows[0]) == ["utterance", "speaker", "language", "text", "keyword"]
    return {row["utterance"]: row for row in rows}


def command(*arguments):
    """Run the command in this process."""
    main(["prepare", *arguments])


# Any folder


def test_any_rate_format_and_channel_count_becomes_16_khz_mono(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    stereo = {rate: np.stack([tone(rate), np.zeros(rate // 2)], axis=1) for rate in (44_100, 48_000)}
    lossless = {
        "a/eight": write(source / "a/eight.wav", tone(8_000), 8_000),
        "a/sixteen": write(source / "a/sixteen.flac", tone(16_000), 16_000),
        "b/odd name.x": write(source / "b/odd name.x.WAV", tone(22_050), 22_050, subtype="FLOAT"),
        "half": write(source / "half.wav", stereo[44_100], 44_100, subtype="PCM_24"),
    }
    lossy = {
        "é/ogg": write(source / "é/ogg.ogg", stereo[48_000], 48_000),
        "é/mp3": write(source / "é/mp3.mp3", tone(32_000), 32_000),
    }
    (source / "notes.txt").write_text("not audio")
    (source / ".hidden.wav").write_text("not audio")
    prepare(str(source), output)

    found = listed(output)
    assert set(found) == {*lossless, *lossy} == set(labels(output))
    for utterance, path in {**lossless, **lossy}.items():
        _, prepared, samples = found[utterance]
        info = soundfile.info(prepared)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        original = soundfile.info(path)
        assert samples == info.frames == math.ceil(original.frames * 16_000 / original.samplerate)

        # The same tone sampled at 16 kHz; half as loud where the other channel is silent.
        expected = tone(16_000) / original.channels
        heard, _ = soundfile.read(prepared)
        middle = slice(800, 7200)  # the resampling filter sees zeros beyond both ends
        tolerance = 0.005 if utterance in lossless else 0.05
        np.testing.assert_allclose(heard[middle], expected[middle], atol=tolerance)


def test_tones_that_16_khz_cannot_hold_are_removed(tmp_path):
    rate, seconds = 44_100, 0.5
    write(tmp_path / "source/a.wav", tone(rate, 12_000, seconds) + tone(rate, 1_000, seconds) / 2, rate)
    for name in "bc":
        write(tmp_path / f"source/{name}.wav", noise(ord(name)))
    prepare(str(tmp_path / "source"), tmp_path / "output")
    heard, _ = soundfile.read(listed(tmp_path / "output")["a"][1])
    spectrum = np.abs(np.fft.rfft(heard[800:7200] * np.hanning(6400)))
    hertz = np.fft.rfftfreq(6400, 1 / 16_000)
    assert hertz[spectrum.argmax()] == 1_000
    assert spectrum[np.abs(hertz - 1_000) > 50].max() < spectrum.max() / 100  # nothing folded to 4 kHz


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two", "three", "four"):
        write(tmp_path / f"source/{name}.wav", noise(len(name) * 7 + ord(name[0])))
    return tmp_path / "source"


def test_a_second_run_converts_only_what_is_new_or_changed(folder, tmp_path):
    def times():
        return {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "output/audio").iterdir()}

    prepare(str(folder), tmp_path / "output")
    before = times()
    changed = write(folder / "two.wav", noise(99))  # as long and as big as before
    os.utime(changed, ns=(1, 1))  # and older
    write(folder / "five.wav", noise(100))
    (tmp_path / "output/audio/five.flac.part").write_bytes(b"cut off by a crash")
    prepare(str(folder), tmp_path / "output")
    after = times()
    assert {name for name in after if after[name] == before.get(name)} == {"one", "three", "four"}
    assert set(after) == {"one", "two", "three", "four", "five"}
    heard, _ = soundfile.read(tmp_path / "output/audio/two.flac")
    np.testing.assert_allclose(heard, noise(99), atol=2**-15)


def test_the_same_audio_under_two_names_counts_once(folder, tmp_path):
    (folder / "copy.wav").write_bytes((folder / "two.wav").read_bytes())
    (folder / "link.wav").symlink_to("two.wav")
    (folder / "again").symlink_to(".")
    prepare(str(folder), tmp_path / "output")
    assert set(listed(tmp_path / "output")) == {"one", "copy", "three", "four"}


def test_an_unreadable_file_is_named_and_costs_nothing(folder, tmp_path):
    output = tmp_path / "output"
    prepare(str(folder), output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (folder / "broken.wav").write_text("not audio")
    write(folder / "empty.wav", noise(0)[:0])
    with pytest.raises(InputError) as caught:
        prepare(str(folder), output)
    assert str(caught.value).startswith(f"{folder}/broken.wav: cannot be read as audio")
    assert "2 of 6 recordings in --source cannot be used" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_unusable_folders_are_refused_before_anything_is_written(folder, tmp_path):
    output = tmp_path / "output"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no audio that can be read"):
        prepare(str(tmp_path / "empty"), output)
    with pytest.raises(InputError, match="absent: is not a folder"):
        prepare(str(tmp_path / "absent"), output)
    with pytest.raises(InputError, match="choose another folder"):
        prepare(str(folder), folder)
    write(folder / "one.flac", noise(3)), write(folder / "three.ogg", noise(3))
    with pytest.raises(InputError, match="2 files named one of different suffix, and 1 more such names; keep one of"):
        prepare(str(folder), output)
    for name in ("one.flac", "three.ogg", "three.wav", "four.wav"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="2 different prompts"):
        prepare(str(folder), output)
    assert not output.exists()


def test_texts_come_from_a_file_with_a_line_for_each_recording(tmp_path, caplog):
    recordings = [Recording(Path(f"/s/{name}.wav"), name) for name in ("a/one", "a/two", "b/one")]
    file = tmp_path / "texts.tsv"
    lines = "a/one\tОдин,\u2028 please!\r\nb/one.wav\tone\r\n\r\nelsewhere\tlost\r\n"
    file.write_bytes(lines.encode("utf-8-sig"))  # as a spreadsheet on Windows writes it
    assert [one.text for one in with_texts(recordings, file)] == ["Один, please!", "", "one"]
    assert f"1 recordings have no text in {file}" in caplog.text
    for content, words in (
        ("a/one Один", ":1: has no tab between the path of a recording and its text"),
        ("c/one\tОдин", ": names no recording; write paths below --source, such as a/one"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(f"--texts {file}{words}")):
            with_texts(recordings, file)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        with_texts(recordings, tmp_path)
    with pytest.raises(InputError, match="asterisk has its own texts"):
        prepare("asterisk", tmp_path / "out", texts=file)


def test_what_was_prepared_inside_the_source_is_not_a_source(folder):
    for _ in range(2):
        prepare(str(folder), folder / "prepared")
        assert set(listed(folder / "prepared")) == {"one", "two", "three", "four"}


# Files of every kind


# By format: the subtype that libsndfile takes for it, where the default does not do.
SUBTYPES = {"SDS": "PCM_16", "XI": "DPCM_16", "WVE": "ALAW"}
OTHER_SUFFIXES = {"aif": "AIFF", "aifc": "AIFF", "wave": "WAV", "oga": "OGG", "opus": "OGG", "snd": "AU", "sph": "NIST",
                  "sf": "IRCAM", "iff": "SVX", "mat": "MAT5"}  # fmt: skip


def test_every_format_of_libsndfile_is_taken_and_the_rest_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    source, written = tmp_path / "source", set()
    kinds = {**{format.lower(): format for format in soundfile.available_formats()}, **OTHER_SUFFIXES}
    for seed, (suffix, format) in enumerate(kinds.items()):
        rate = 8_000 if format == "WVE" else 44_100 if format == "XI" else 16_000
        subtype = "OPUS" if suffix == "opus" else SUBTYPES.get(format)
        path = source / (f"{suffix}.{suffix.upper()}" if seed % 2 else f"{suffix}.{suffix}")
        if format in ("RAW", "SD2"):  # without a header; a resource fork's, which only Apple's disks keep
            continue
        write(path, noise(seed, 6400), rate, format=format, subtype=subtype)
        written.add(suffix)
    write(source / "phone.gsm", noise(0), 8_000, format="RAW", subtype="GSM610")
    (source / "weights.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    for name in ("a.m4a", "b.M4A", "c.wma", "d.raw", "notes.txt", "README", ".hidden.wav"):
        (source / name).write_text("not to be opened")
    (source / ".git").mkdir()
    prepare(str(source), tmp_path / "output")
    assert set(listed(tmp_path / "output")) == {*written, "phone"} and len(written) > 30
    assert [line for line in caplog.messages if "left aside" in line] == [
        "4 files left aside: audio of a kind that cannot be read here; convert it to FLAC, such as with ffmpeg"
        " (2 .m4a, 1 .wma, 1 .raw)",
        "2 files left aside: no audio by their suffix (1 without suffix, 1 .txt)",
        "1 files left aside: no audio in them (1 .mat)",
        "1 files left aside: their names begin with a dot (1 .wav)",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.m4a").touch()
    with pytest.raises(InputError, match=r"no audio that can be read.*; 1 files left aside: audio .* \(1 \.m4a\)"):
        prepare(str(tmp_path / "other"), tmp_path / "none")


def test_recordings_that_cannot_be_used_are_named_and_left_out_up_to_the_limit(tmp_path, caplog):
    source, output = tmp_path / "source", tmp_path / "output"
    for index in range(96):
        write(source / f"good{index}.wav", noise(index, 400))
    (source / "empty.wav").touch()
    (source / "empty too.wav").touch()  # the same bytes: named nevertheless
    (source / "text.flac").write_text("not audio")
    write(source / "short.wav", noise(0, 399))
    bad = ["empty", "empty too", "text", "short"]
    with pytest.raises(InputError, match=r"\(4 of 100 recordings in --source cannot .*--bad-audio-limit=0.03 of"):
        prepare(str(source), output, bad_audio_limit=0.03)
    assert not (output / "train.tsv").exists() and not list(output.rglob("*.part"))
    for _ in range(2):  # the second time most are there already
        caplog.clear()
        prepare(str(source), output, bad_audio_limit=0.04)
        lines = sorted(line for line in caplog.messages if line.startswith("bad audio | skipped "))
        assert len(lines) == 4 and all(f"{source}/{name}." in "".join(lines) for name in bad)
        assert set(listed(output)) == set(labels(output)) == {f"good{index}" for index in range(96)}
    (source / "text.flac").unlink(), (source / "short.wav").unlink(), (source / "empty too.wav").unlink()
    for index in range(96, 104):
        write(source / f"good{index}.wav", noise(index, 400))
    prepare(str(source), output)  # one in a hundred by default
    assert len(listed(output)) == 104


def test_names_that_no_manifest_can_hold_are_left_out_and_those_of_other_encodings_are_kept(tmp_path, caplog):
    source, output = tmp_path / "source", tmp_path / "output"
    names = ["line\nbreak", "tab\tstop", "a", "b", os.fsdecode(b"caf\xe9/\xe9t\xe9")]
    kept = [f"{name}.flac" for name in names[2:]]
    for index, name in enumerate(names):
        written = write(source / f"{index}.wav", noise(index))
        (source / name).parent.mkdir(exist_ok=True)
        written.rename(source / f"{name}.wav")
    for _ in range(2):  # the second time most are there already
        caplog.clear()
        prepare(str(source), output, bad_audio_limit=0.4)
        assert [line.endswith("rename the file") for line in caplog.messages] == [True, True]
        manifests = [read_manifest(output / f"{split}.tsv") for split in ("train", "valid", "test")]
        assert sorted(path for manifest in manifests for path in manifest.paths) == kept
    assert check_speech(output) == []


def test_a_full_disk_is_no_fault_of_the_recording(folder, tmp_path):
    write(folder / "one.wav", noise(0, 16_000))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (30, 9_000, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # Python ignores the signal
            with pytest.raises(InputError, match="one.flac: cannot be written .File too large.; make room") as caught:
                prepare_module._convert((folder / "one.wav", tmp_path / "one.flac"))
            assert "\n" not in str(caught.value) and not list(tmp_path.glob("one.flac*"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# Levels


def test_no_waveform_is_clipped(tmp_path, caplog):
    source, output = tmp_path / "source", tmp_path / "output"
    speech = noise(0, 8000) / 0.3
    loud = np.clip(8 * tone(44_100, 1000), -1, 1)  # touches full scale and overshoots it once it is resampled
    quiet = 1e-4 * tone(16_000)
    write(source / "full.wav", loud, 44_100)
    write(source / "over.wav", 1.3 * speech, subtype="FLOAT")
    write(source / "quiet.wav", quiet, subtype="FLOAT")
    write(source / "silent.wav", np.zeros(8000))
    ranges = {"int16": 2**15, "int24": 2**23, "int32": 2**31, "unit variance": 5}
    for name, scale in ranges.items():
        write(source / f"{name}.wav", scale * speech, subtype="DOUBLE" if name == "int32" else "FLOAT")
    both = np.stack([speech, -0.99 * speech], axis=1)
    write(source / "upside down.wav", both)
    write(source / "one side.wav", both * [1, 0])
    with pytest.raises(InputError, match=r"int16.wav: holds samples up to 327\d\d.*, but full scale is 1; .*5 of 10"):
        prepare(str(source), output)
    prepare(str(source), output, bad_audio_limit=0.5)
    bad = [line for line in caplog.messages if line.startswith("bad audio | skipped")]
    assert len(bad) == 5 and sum("full scale is 1" in line for line in bad) == 4
    assert any("upside down.wav: its channels cancel" in line for line in bad)
    found = listed(output)
    assert set(found) == {"full", "over", "quiet", "silent", "one side"}
    heard = {name: soundfile.read(path)[0] for name, (_, path, _) in found.items()}
    np.testing.assert_allclose(heard["over"], speech / np.abs(speech).max(), atol=2**-15)
    np.testing.assert_allclose(heard["quiet"], quiet, atol=2**-23)
    np.testing.assert_allclose(heard["one side"], speech / 2, atol=2**-14)
    assert not heard["silent"].any()
    reference = torchaudio_resample(torch.from_numpy(loud), 44_100, 16_000).numpy()
    assert np.abs(reference).max() > 1.01
    np.testing.assert_allclose(heard["full"], reference / np.abs(reference).max(), atol=2**-14)
    (line,) = [line for line in caplog.messages if "overshoot" in line]
    assert line.startswith("2 recordings overshoot full scale") and "over with a peak of 1.3" in line


# Long recordings


def test_hours_of_music_take_no_more_memory_than_minutes(tmp_path):
    minutes = 10
    write(tmp_path / "long.wav", np.zeros((100, 2)), 44_100)
    size = minutes * 60 * 44_100 * 4
    header = bytearray((tmp_path / "long.wav").read_bytes()[:44])
    header[4:8], header[40:44] = (36 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    with open(tmp_path / "long.wav", "wb") as file:
        file.write(header)
        file.truncate(44 + size)  # a hole: silence that takes no disk
    # As a worker does it, in a process of its own; the whole as floats would take 212 MB.
    code = """if True:
        import sys
        from fairseq_stack.data import prepare
        before = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
        result = prepare._convert((sys.argv[1], sys.argv[2]))
        after = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
        print(result.samples, before.split()[1], after.split()[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "long.wav", tmp_path / "long.flac"],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    samples, before, after = map(int, done.stdout.split())
    assert samples == minutes * 60 * 16_000
    assert after < 250_000 and after - before < 60_000  # kB


# Splits


def test_five_percent_of_the_prompts_each_are_held_out_whatever_the_order():
    recordings = [Recording(Path(), f"{speaker}/prompt{index}") for speaker in "abc" for index in range(400)]
    split = choose_splits(recordings, {})
    for index in range(400):
        assert len({split[f"{speaker}/prompt{index}"] for speaker in "abc"}) == 1
    counts = {name: list(split.values()).count(name) // 3 for name in ("train", "valid", "test")}
    assert counts == {"train": 360, "valid": 20, "test": 20}
    assert choose_splits(recordings[::-1], {}) == split
    # A further speaker of the same prompts moves nothing.
    more = choose_splits(recordings + [Recording(Path(), f"d/PROMPT{index}") for index in range(400)], {})
    assert more == {**split, **{f"d/PROMPT{index}": split[f"a/prompt{index}"] for index in range(400)}}


def test_prompts_that_share_a_text_or_audio_share_a_split():
    # With independent splits, one pair in five would be torn.
    recordings = [Recording(Path(), f"en/a{index}", text=f"Press {index}, please.") for index in range(200)]
    recordings += [Recording(Path(), f"en/b{index}", text=f"press {index} PLEASE") for index in range(200)]
    recordings += [Recording(Path(), f"fr/c{index}") for index in range(200)]
    recordings += [Recording(Path(), f"fr/b{index}") for index in range(200)]
    copies = {f"fr/c{index}": f"fr/b{index}" for index in range(200)}
    split = choose_splits(recordings, copies)
    assert len(set(split.values())) == 3
    assert choose_splits(recordings[::-1], copies) == split
    for index in range(200):
        assert len({split[f"{name}{index}"] for name in ("en/a", "en/b", "fr/b", "fr/c")}) == 1


def shares(recordings, **options):
    split = choose_splits(recordings, {}, **options)
    return split, {name: list(split.values()).count(name) / len(split) for name in ("train", "valid", "test")}


def layout(*patterns, count=200):
    return [Recording(Path(), pattern.format(index)) for index in range(count) for pattern in patterns]


@pytest.mark.parametrize(
    "recordings",
    [
        layout("session{}/audio"),
        layout("{:03}/recording", "{:03}/recording 2"),
        layout("day{}/interview", "day{}/lecture", "day{}/questions"),  # roles: few names that many folders have
        # VoxCeleb: speaker, video, number
        [Recording(Path(), f"id{10000 + speaker}/{speaker * 7919:011x}/{number:05}")
         for speaker in range(10) for number in range(1, 1 + 4 * speaker)],
        layout("19/198/19-198-{:04}"),
        [Recording(Path(), f"book{book}/chapter_{number:02}") for book in range(10) for number in range(12)],
    ],
)  # fmt: skip
def test_names_that_tell_nothing_do_not_hold_recordings_together(recordings):
    _, found = shares(recordings)
    assert 0.04 < found["valid"] < 0.06 and 0.04 < found["test"] < 0.06


def test_a_number_tells_a_prompt_with_its_folder():
    recordings = [Recording(Path(), f"{voice}/{kind}/{number}") for voice in ("anna", "bea")
                  for kind in ("digits", "dates") for number in range(20)]  # fmt: skip
    split, _ = shares(recordings)
    for kind in ("digits", "dates"):
        for number in range(20):
            assert split[f"anna/{kind}/{number}"] == split[f"bea/{kind}/{number}"]
    assert any(split[f"anna/digits/{number}"] != split[f"anna/dates/{number}"] for number in range(20))


@pytest.mark.parametrize(
    "name", ["p225/p225_{}_mic{}", "{:03}/mic{}", "meetings/{}/Channel-{}", "batch{}/microphone {}"]
)
def test_what_several_microphones_recorded_at_once_is_in_one_split(name):
    recordings = [Recording(Path(), name.format(number, mic)) for number in range(100) for mic in (1, 2)]
    split, found = shares(recordings)
    assert all(split[name.format(number, 1)] == split[name.format(number, 2)] for number in range(100))
    assert found == {"train": 0.9, "valid": 0.05, "test": 0.05}


def test_speakers_are_kept_together_on_request_and_the_shares_too():
    sizes = [10, 20, 30, 40, 300] * 10
    recordings = [Recording(Path(), f"{speaker}/prompt{number}", f"speaker{speaker}", text=f"Text {number}")
                  for speaker, size in enumerate(sizes) for number in range(size)]  # fmt: skip
    split, found = shares(recordings, grouping="speaker")
    for speaker, size in enumerate(sizes):
        assert len({split[f"{speaker}/prompt{number}"] for number in range(size)}) == 1
    assert 0.03 < found["valid"] < 0.06 and 0.03 < found["test"] < 0.06
    few = [Recording(Path(), f"{speaker}/{number}", speaker) for speaker, size in (("a", 90), ("b", 1), ("c", 1))
           for number in range(size)]  # fmt: skip
    assert shares(few, grouping="speaker")[0]["a/0"] == "train"


def test_speakers_are_the_first_folders(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    for seed, name in enumerate(("ann/1/a", "ann/2/b", "bob/1/c", "cleo/1/a")):
        write(source / f"{name}.wav", noise(seed))
    command("--source", source, "--output", output, "--split-by", "speaker")
    found = listed(output)
    assert found["ann/1/a"][0] == found["ann/2/b"][0] and len({split for split, _, _ in found.values()}) == 3
    assert labels(output)["cleo/1/a"]["speaker"] == "cleo"
    write(source / "alone.wav", noise(9))
    with pytest.raises(SystemExit, match="alone.wav: its speaker is not known"):
        command("--source", source, "--output", output, "--split-by", "speaker")
    source.rename(tmp_path / "wav")
    above = tmp_path / "above"
    above.mkdir(), (tmp_path / "wav").rename(above / "wav"), (above / "wav" / "alone.wav").unlink()
    with pytest.raises(SystemExit, match="1 different speakers.* give --source the folder that holds the speakers'"):
        command("--source", above, "--output", output, "--split-by", "speaker")
    command("--source", above / "wav", "--output", output, "--split-by", "speaker")


def test_the_same_sound_in_two_formats_shares_a_split(tmp_path):
    source = tmp_path / "source"
    for index in range(30):
        write(source / f"a/x{index}.wav", noise(index))
        samples, _ = soundfile.read(source / f"a/x{index}.wav")
        write(source / f"b/y{index}.flac", samples)
    prepare(str(source), tmp_path / "output")
    found = listed(tmp_path / "output")
    assert len(found) == 60 and all(found[f"a/x{index}"][0] == found[f"b/y{index}"][0] for index in range(30))


# Debian's recordings


@pytest.fixture
def unpacked(tmp_path):
    """A small tree as dpkg leaves it."""
    sounds = tmp_path / "unpacked/usr/share/asterisk/sounds"
    texts = {
        "digits/1": "one",
        "vm-one": "One.",
        "letters/a": "a",
        "letters/at": "at [@]",
        "digits/10": "ten",
        "ascending-2tone": "[ascending tones]",
        "silence/1": "(1 second of silence)",
        **{f"prompt-{index}": f"This is prompt: {index}" for index in range(20)},
    }
    for seed, name in enumerate(texts):
        write(sounds / f"en_US_f_Allison/{name}.wav", noise(seed), 8_000)
        write(sounds / f"ru_RU_f_IvrvoiceRU/{name}.wav", noise(seed + 100), 8_000)
    write(sounds / "ru_RU_f_IvrvoiceRU/is.wav", noise(0)[:0], 8_000)
    gsm = {"format": "RAW", "subtype": "GSM610"}
    for seed, name in enumerate(("digits/1", "digits/h-1", "vm-first", "ascending-2tone")):
        write(sounds / f"es/{name}.gsm", noise(seed + 200), 8_000, **gsm)
    (sounds / "es/vm-first.gsm").write_bytes((sounds / "es/digits/h-1.gsm").read_bytes())
    (sounds / "digits").mkdir()
    (sounds / "digits/es").symlink_to("../es/digits")
    document = tmp_path / "unpacked/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    document.parent.mkdir(parents=True)
    lines = "".join(f"{name}: {text}\n" for name, text in texts.items())
    document.write_bytes(gzip.compress(f"; Core: sounds\n\n{lines}".encode()))
    return tmp_path / "unpacked"


def test_debian_recordings_get_speakers_languages_texts_and_keywords(unpacked, tmp_path):
    output = tmp_path / "output"
    prepare_recordings(asterisk_recordings(unpacked), output)
    spoken = ["digits/1", "vm-one", "letters/a", "letters/at", "digits/10"]
    spoken += [f"prompt-{index}" for index in range(20)]
    found, rows = listed(output), labels(output)
    assert (
        set(found)
        == set(rows)
        == {
            *(f"en_US_f_Allison/{name}" for name in spoken),
            *(f"ru_RU_f_IvrvoiceRU/{name}" for name in spoken),
            "es/digits/1",
            "es/vm-first",  # digits/h-1 is the same audio
        }
    )
    assert {tuple(row.values()) for row in rows.values()} > {
        ("en_US_f_Allison/digits/1", "Allison", "en", "one", "1"),
        ("en_US_f_Allison/letters/at", "Allison", "en", "at", ""),
        ("en_US_f_Allison/letters/a", "Allison", "en", "a", "a"),
        ("es/digits/1", "July", "es", "", "1"),
        ("ru_RU_f_IvrvoiceRU/digits/10", "IvrvoiceRU", "ru", "", ""),
        ("en_US_f_Allison/prompt-3", "Allison", "en", "This is prompt: 3", ""),
    }
    for name in spoken:
        assert found[f"en_US_f_Allison/{name}"][0] == found[f"ru_RU_f_IvrvoiceRU/{name}"][0]
    one = ("es/digits/1", "en_US_f_Allison/vm-one", "en_US_f_Allison/digits/1")
    assert len({found[utterance][0] for utterance in one}) == 1
    assert {split for split, _, _ in found.values()} == {"train", "valid", "test"}
    assert found["es/digits/1"][2] == 2 * 1600  # 8 kHz became 16 kHz


def test_other_debian_recordings_get_phones_and_czech_and_the_letters_of_other_languages(unpacked, tmp_path):
    share = unpacked / "usr/share"
    voice = share / "festival/voices/russian/msu_ru_nsh_clunits"
    for number, phones in ((1, "pau k aa pau"), (2, "pau pau tt")):
        write(voice / f"wav/ru_000{number}.wav", noise(300 + number))
        lines = "".join(f"{0.25 * end:.5f} 125 {phone}\n" for end, phone in enumerate(phones.split(), start=1))
        (voice / "lab").mkdir(exist_ok=True)
        (voice / f"lab/ru_000{number}.lab").write_text(f"#\n{lines}")
    (voice / "etc").mkdir()
    (voice / "etc/txt.done.data").write_text('( ru_0001 "+Окна дом+ов, - иные." )\n( ru_0002 "Нет." )\n')
    game = share / "games/fillets-ng"
    for seed, name in enumerate(("rush/cs/m-uz", "rush/cs/let-v-oko", "rush/cs/hs-nic", "rush/en/m-uz")):
        write(game / f"sound/{name}.ogg", noise(400 + seed, 4410), 22_050)
    (game / "script/rush").mkdir(parents=True)
    (game / "script/rush/dialogs_cs.lua").write_text(
        'dialogId("v-ne", "font_big", "No")\n\ndialogId("m-uz", "font_small",\n"Again")\ndialogStr("Už zase?")\n\n'
    )
    letters = share / "klettres"
    for seed, name in enumerate(("cs/alpha/a-0", "cs/alpha/a-1", "cs/syllab/b", "pt_BR/alpha/x")):
        write(letters / f"{name}.ogg", noise(500 + seed, 8820), 44_100)
    sounds = '<sound name="A" file="cs/alpha/a-0.ogg"/><sound name="Š" file="cs/alpha/a-1.ogg" /><sound'
    (letters / "cs/sounds.xml").write_text(
        f'<!-- é -->\n<klettres>{sounds} name="B" file="cs/syllab/b.ogg"/></klettres>'
    )

    output = tmp_path / "output"
    recordings = debian_recordings(unpacked)
    prepare_recordings(recordings, output)
    rows = {name: tuple(row.values())[1:] for name, row in labels(output).items()}
    new = {"festvox-ru/ru_0001", "festvox-ru/ru_0002"}
    new |= {"fillets-ng/rush/m-uz", "fillets-ng/rush/let-v-oko", "fillets-ng/rush/hs-nic"}
    new |= {"klettres/cs/alpha/a-0", "klettres/cs/alpha/a-1", "klettres/cs/syllab/b", "klettres/pt_BR/alpha/x"}
    assert rows.keys() == {recording.utterance for recording in asterisk_recordings(unpacked)} - {"es/digits/h-1"} | new
    assert rows["festvox-ru/ru_0001"] == ("nsh", "ru", "Окна домов, - иные.", "")
    assert rows["fillets-ng/rush/m-uz"] == ("small fish", "cs", "Už zase?", "")
    assert rows["fillets-ng/rush/let-v-oko"] == ("big fish", "cs", "", "")
    assert rows["fillets-ng/rush/hs-nic"] == ("", "cs", "", "")
    assert rows["klettres/cs/alpha/a-0"] == ("klettres cs", "cs", "A", "a")
    assert rows["klettres/cs/alpha/a-1"] == ("klettres cs", "cs", "Š", "")
    assert rows["klettres/cs/syllab/b"] == ("klettres cs", "cs", "B", "")
    assert rows["klettres/pt_BR/alpha/x"] == ("", "pt", "", "")
    found = listed(output)
    assert found["klettres/cs/alpha/a-0"][0] == found["en_US_f_Allison/letters/a"][0]  # the same letter
    assert (output / "phones.tsv").read_text().splitlines() == [
        "utterance\tphones\tends",
        "festvox-ru/ru_0001\tpau k aa pau\t0.25000 0.50000 0.75000 1.00000",
        "festvox-ru/ru_0002\tpau pau tt\t0.25000 0.50000 0.75000",
    ]
    prepare_recordings(asterisk_recordings(unpacked), output)
    assert not (output / "phones.tsv").exists()


def test_without_apt_get_only_packages_that_are_there_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    archive = tmp_path / "some-speech_1.0-1_all.deb"
    archive.touch()
    assert fetch_packages(["some-speech"], tmp_path) == [archive]
    with pytest.raises(InputError, match=r"^some-speech-wav: cannot be fetched; .* \(apt-get: No such file"):
        fetch_packages(["some-speech", "some-speech-wav"], tmp_path)


@pytest.mark.parametrize("source, packages", [("asterisk", ASTERISK), ("debian-speech", (*ASTERISK, *OTHERS))])
def test_a_damaged_package_is_named(tmp_path, source, packages):
    folder = tmp_path / "packages"
    folder.mkdir()
    for package in packages:
        (folder / f"{package}_1.0_all.deb").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"asterisk-core-sounds-en_1\.0_all\.deb: cannot be unpacked"):
        prepare(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
    assert len(list(folder.iterdir())) == len(packages)


def test_packages_are_unpacked_and_only_known_speakers_can_be_kept_apart(unpacked, tmp_path):
    for package in (*ASTERISK, *OTHERS):
        root = tmp_path / package
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
        )
    # One package has all of the tree, and three sounds whose speakers nobody knows.
    (unpacked / "usr").rename(tmp_path / "klettres-data/usr")
    for seed, name in enumerate("abc"):
        write(tmp_path / f"klettres-data/usr/share/klettres/de/alpha/{name}.ogg", noise(600 + seed))
    voice = tmp_path / "klettres-data/usr/share/festival/voices/russian/msu_ru_nsh_clunits/etc"
    voice.mkdir(parents=True)
    (voice / "txt.done.data").touch()
    output = tmp_path / "output"
    (output / "packages").mkdir(parents=True)
    for package in (*ASTERISK, *OTHERS):
        subprocess.run(["dpkg-deb", "-b", tmp_path / package, output / "packages"], check=True, capture_output=True)
    command("--source", "debian-speech", "--output", output)
    assert len(labels(output)) == 55 and not (output / "packages/unpacked").exists()
    command("--source", "debian-speech", "--output", output, "--split-by", "speaker")
    assert {row["speaker"] for row in labels(output).values()} == {"Allison", "IvrvoiceRU", "July"}


# LibriSpeech


@pytest.fixture
def librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    for split, speaker, chapter in (
        ("train-clean-100", 19, 198),
        ("train-other-500", 25, 123),
        ("dev-clean", 84, 121),
        ("test-other", 61, 70),
    ):
        folder, stem = root / f"{split}/{speaker}/{chapter}", f"{speaker}-{chapter}"
        for index in range(2):
            write(folder / f"{stem}-000{index}.flac", noise(speaker + index, 1600 + speaker))
        for name in (f"._{stem}-0000.flac", f"._{stem}.trans.txt"):  # macOS writes them beside what it unpacks
            (folder / name).write_bytes(b"\0\5\x16\x07\xff")
        (folder / f"{stem}.trans.txt").write_text(f"{stem}-0000 FIRST OF {speaker}\n{stem}-0001 IT'S THE SECOND\n")
    return root


def test_librispeech_is_listed_in_place_with_its_own_splits(librispeech, tmp_path):
    output = tmp_path / "output"
    prepare(str(librispeech), output)
    assert [(utterance, split, size) for utterance, (split, _, size) in listed(output).items()] == [
        ("train-clean-100/19/198/19-198-0000", "train", 1619),
        ("train-clean-100/19/198/19-198-0001", "train", 1619),
        ("train-other-500/25/123/25-123-0000", "train", 1625),
        ("train-other-500/25/123/25-123-0001", "train", 1625),
        ("dev-clean/84/121/84-121-0000", "valid", 1684),
        ("dev-clean/84/121/84-121-0001", "valid", 1684),
        ("test-other/61/70/61-70-0000", "test", 1661),
        ("test-other/61/70/61-70-0001", "test", 1661),
    ]
    assert read_manifest(output / "train.tsv").root == str(librispeech)
    assert not (output / "audio").exists()
    assert tuple(labels(output)["dev-clean/84/121/84-121-0000"].values()) == (
        "dev-clean/84/121/84-121-0000",
        "84",
        "en",
        "FIRST OF 84",
        "",
    )


def test_the_folder_around_librispeech_will_do_and_test_folders_are_optional(librispeech, tmp_path):
    prepare(str(tmp_path), tmp_path / "output")
    for path in librispeech.glob("test-other/*/*/*"):
        path.unlink()
    prepare(str(tmp_path), tmp_path / "output")
    written = sorted(path.name for path in (tmp_path / "output").iterdir())
    assert written == ["labels.tsv", "train.tsv", "valid.tsv"]
    for path in librispeech.glob("dev-clean/*/*/*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no dev-\* folder"):
        prepare(str(librispeech), tmp_path / "output")


def test_librispeech_files_of_another_rate_are_refused(librispeech, tmp_path):
    write(librispeech / "dev-clean/84/121/84-121-0001.flac", noise(0), 8_000)
    with pytest.raises(InputError, match=r"84-121-0001\.flac: .* 8000 Hz"):
        prepare(str(librispeech), tmp_path / "output")
    assert not (tmp_path / "output").exists()


# The command line


def test_the_script_prepares_checks_and_names_each_damage_in_a_line(folder, tmp_path, capsys):
    output = tmp_path / "output"
    command("--source", folder, "--output", output)
    command("--output", output, "--check")
    train = f"{output}: train 2 files, 0.00 h; valid 1 files, 0.00 h; test 1 files, 0.00 h"
    assert capsys.readouterr().out.splitlines() == [train, train]

    (output / "audio/three.flac").unlink()
    whole = (output / "audio/one.flac").read_bytes()
    (output / "audio/one.flac").write_bytes(whole[:-40])
    with pytest.raises(SystemExit) as stopped:
        command("--output", output, "--check")
    assert sorted(line.split(": ")[0] for line in stopped.value.code.splitlines()) == [
        f"{output}/audio/one.flac",
        f"{output}/audio/three.flac",
    ]

    # What was damaged is mended by removing it and preparing again.
    (output / "audio/one.flac").unlink()
    command("--source", folder, "--output", output)
    command("--output", output, "--check")


def test_check_without_manifests_says_how_to_make_them(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*train\.tsv: cannot read .* make one with fairseq-stack prepare"):
        command("--output", tmp_path, "--check")


def test_a_mistake_on_the_command_line_is_one_line_and_a_nonzero_exit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_stack", "prepare", "--source", "absent", "--output", "out"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: --source {tmp_path}/absent: is not a folder")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
