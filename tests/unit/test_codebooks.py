"""Codes choose the nearest entries, codebooks are learned once, and only those of this teacher are used."""

import multiprocessing

import pytest
import torch

from fairseq_stack.errors import InputError
from fairseq_stack.targets.codebooks import learn_codebooks, read_codebooks, write_codebooks
from fairseq_stack.targets.formats import check_format, codebook_shape, frame_bytes

WIDTH = 10


def frames(count, seed=0):
    """[count, WIDTH], with correlated features and a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, WIDTH, generator=generator) @ mixing + 3


@pytest.fixture(scope="module")
def learned():
    """Four codebooks for ten features: two of them have a component of zeros."""
    return learn_codebooks(frames(600), frames(200, 1), 4, 8)


def test_a_code_is_the_nearest_entry_and_stands_for_its_vector(learned):
    values = frames(50, 2)[None]
    codes = learned.encode(values.half())
    assert codes.shape == (1, 50, 4) and codes.dtype == torch.uint8
    rotation, entries = learned.rotation.double(), learned.entries.double()
    for frame, chosen in zip(values[0].half().double(), codes[0].tolist()):
        decoded = learned.mean.double()
        for book in range(4):
            distances = ((frame - learned.mean) @ rotation[:, book] - entries[book]).pow(2).sum(1)
            assert distances[chosen[book]] <= distances.min() * (1 + 1e-4)
            decoded = decoded + rotation[:, book] @ entries[book, chosen[book]]
        found = learned.decode(torch.tensor([chosen]))[0]
        torch.testing.assert_close(found.double(), decoded, rtol=1e-5, atol=1e-5)
    exact, rough = (learned.decode(codes, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() < 0.005 * (exact - learned.mean).norm()


def test_strong_and_weak_components_are_dealt_out_in_turn(learned):
    components = torch.einsum("nd,dme->nme", frames(5000) - learned.mean, learned.rotation).var(0)
    by_turns = components.T.flatten()[:WIDTH]
    assert (by_turns[:-1] > by_turns[1:]).all() and (components[2:, 2] < 1e-9).all()


def test_what_the_codes_keep_is_measured_on_other_frames_and_grows_with_the_bytes(learned):
    held_out = frames(200, 1)
    errors = learned.decode(learned.encode(held_out)).double() - held_out.double()
    assert learned.kept == pytest.approx(
        1 - float(errors.var(0, False).sum() / held_out.double().var(0, False).sum()), abs=2e-3
    )
    assert (
        learn_codebooks(frames(600), held_out, 1, 8).kept
        < learned.kept
        < learn_codebooks(frames(600), held_out, 4, 64).kept
    )
    assert learn_codebooks(frames(600), held_out, 4, 8).digest == learned.digest


def test_a_single_codebook_finds_the_clusters():
    centres = 10 * torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))
    cluster = torch.arange(4000) % 400
    samples = centres[cluster] + 0.01 * frames(4000)
    codes = learn_codebooks(samples, samples, 1, 400).encode(samples)[:, 0]
    assert codes.dtype == torch.int16
    # k-means may join two of the clusters, and a cluster is rarely split.
    assert sum(len(codes[cluster == each].unique()) == 1 for each in range(400)) > 350 and len(codes.unique()) > 350


def test_the_first_codebooks_stay(tmp_path, learned):
    path = tmp_path / "codebooks/4.pq4.safetensors"
    assert read_codebooks(path, "t", WIDTH, 4, 8) is None
    context = multiprocessing.get_context("fork")
    others = [learn_codebooks(frames(600, seed), frames(200, 1), 4, 8) for seed in range(4)]
    processes = [context.Process(target=write_codebooks, args=(each, path, "t")) for each in others]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first = read_codebooks(path, "t", WIDTH, 4, 8)
    assert first.digest in {each.digest for each in others} and len(list(path.parent.iterdir())) == 1
    write_codebooks(learned, path, "t")
    again = read_codebooks(path, "t", WIDTH, 4, 8)
    assert (again.digest, again.kept) == (first.digest, first.kept)


def test_codebooks_that_cannot_be_used_are_refused_in_one_line(tmp_path, learned):
    path = tmp_path / "4.pq4.safetensors"
    write_codebooks(learned, path, "t")
    whole = path.read_bytes()
    for arguments, message in (
        (("u", WIDTH, 4, 8), "has codebooks of the teacher t, not of u"),
        (("t", WIDTH + 1, 4, 8), "has codebooks of the shapes"),
        (("t", WIDTH, 4, 16), "has codebooks of the shapes"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            read_codebooks(path, *arguments)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value) and "delete" in str(refused.value)
    for damaged in (whole[:100], b"", whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged") as refused:
            read_codebooks(path, "t", WIDTH, 4, 8)
        assert "\n" not in str(refused.value)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_codebooks(learned, tmp_path / "file" / "x", "t")


def test_names_of_formats():
    assert [codebook_shape(form) for form in ("fp16", "pq16", "units500")] == [None, (16, 256), (1, 500)]
    assert [frame_bytes(form, 768) for form in ("fp16", "int8", "pq64", "units256", "units500")] == [
        1536,
        770,
        64,
        1,
        2,
    ]
    for form in ("pq", "pq0", "units1", "units40000", "opq8", "units-5"):
        with pytest.raises(InputError, match=f"task.target_format={form}"):
            check_format(form)
