"""What a store gives back is what was put in, for the audio and arrays that were asked for, or nothing."""

import multiprocessing
import os
import resource
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.data.manifest import Manifest, Names
from fairseq_stack.errors import InputError
from fairseq_stack.targets.codebooks import learn_codebooks
from fairseq_stack.targets.formats import decode, encode
from fairseq_stack.targets.store import CNN, TargetStore, UnusableEntry, file_source, waveform_digest

CONV_LAYERS = [(8, 400, 320)]
WIDTH = 16


def store(folder, layers=(2, 3), cnn=False, form="fp16"):
    return TargetStore(folder, list(layers), cnn, form, WIDTH, CONV_LAYERS)


def entry(made, utterance="a.wav", start=0, samples=4000, digest="d", source="s"):
    return replace(made.entry(utterance, start, samples), digest=digest, source=source)


def arrays(made, batch=1, frames=12, seed=0):
    torch.manual_seed(seed)
    widths = {name: 8 if name == CNN else WIDTH for name in made.arrays}
    return made.encode({name: torch.randn(batch, frames, width) for name, width in widths.items()}, {})


def with_codebooks(made, seed=0):
    """The store, with codebooks of random frames where it lacks them."""
    torch.manual_seed(seed)
    for name in made.without_codebooks:
        width = 8 if name == CNN else WIDTH
        made.keep_codebooks(name, learn_codebooks(torch.randn(300, width), torch.randn(50, width), *made.shape))
    return made


def equal(ours, theirs, row=0):
    return all(torch.equal(parts[part], theirs[name][part][row, : len(parts[part])])
               for name, parts in ours.items() for part in parts)  # fmt: skip


@pytest.mark.parametrize("form", ["fp16", "int8", "pq2", "units20", "units300"])
@pytest.mark.parametrize("cnn", [False, True])
def test_an_entry_comes_back_as_it_was_stored_without_the_padding(tmp_path, form, cnn):
    made = with_codebooks(store(tmp_path, cnn=cnn, form=form))
    entries = {1: entry(made, "a.wav"), 3: entry(made, "b.wav", samples=2000)}
    targets = arrays(made, batch=4)
    made.write(entries, targets)
    assert [entries[row].frames for row in (1, 3)] == [12, 6]
    for row in entries:
        read = made.read(entries[row])
        assert list(read) == [2, 3, *[CNN] * cnn] and equal(read, targets, row)
        assert all(len(values) == entries[row].frames for parts in read.values() for values in parts.values())
    assert made.read(entry(made, "c.wav")) is None


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_how_a_target_lies_in_memory_does_not_matter(tmp_path, form):
    """A teacher may give a view of features [B, D, T], which numpy writes by columns."""
    made = store(tmp_path, form=form)
    targets = made.encode({name: torch.randn(1, WIDTH, 12).transpose(1, 2) for name in made.arrays}, {})
    made.write({0: entry(made)}, targets)
    read = made.read(entry(made))
    assert equal(read, targets)
    assert all(
        values.shape == (12, size) for parts in read.values() for values, size in zip(parts.values(), (WIDTH, 1))
    )


class OnItsWay(torch.Tensor):
    """A tensor that comes from its device when it is let go."""

    let_go = threading.Event()

    def cpu(self):
        assert self.let_go.wait(timeout=60)
        return self.as_subclass(torch.Tensor)


def test_the_next_batch_is_computed_while_one_is_written_and_an_error_reaches_whoever_writes_next(tmp_path):
    made = store(tmp_path)
    slow, broken = arrays(made), arrays(made)
    slow[2]["values"] = slow[2]["values"].as_subclass(OnItsWay)
    broken[2]["values"][0, 0, 0] = torch.nan
    with made.writing_beside():
        made.write({0: entry(made, "a.wav")}, slow)
        assert made.read(entry(made, "a.wav")) is None  # the write is under way
        OnItsWay.let_go.set()
        made.write({0: entry(made, "b.wav")}, broken)
        with pytest.raises(InputError, match="b.wav is not finite"):
            made.write({0: entry(made, "c.wav")}, arrays(made))
    with pytest.raises(InputError, match="b.wav is not finite"), made.writing_beside():
        made.write({0: entry(made, "b.wav")}, broken)
    with made.writing_beside():
        made.write({0: entry(made, "d.wav")}, arrays(made))
    assert made.read(entry(made, "a.wav")) and made.read(entry(made, "d.wav"))
    made.write({0: entry(made, "e.wav")}, arrays(made))
    assert made.read(entry(made, "e.wav"))


def test_an_entry_is_for_one_recording_window_and_audio(tmp_path):
    made = store(tmp_path)
    made.write({0: entry(made)}, arrays(made))
    assert made.read(entry(made, start=1)) is None and made.read(entry(made, samples=4001)) is None
    for other in (entry(made, digest="other"), entry(made, digest=None, source="other")):
        with pytest.raises(UnusableEntry, match="other audio"):
            made.read(other)
    assert made.read(entry(made, source="other")) and made.read(entry(made, digest=None))


def test_a_digest_tells_audio_apart_by_one_sample_and_a_source_by_a_write(tmp_path):
    waveform = torch.zeros(100)
    digest = waveform_digest(waveform)
    waveform[50] = 1e-7
    assert waveform_digest(waveform) != digest
    (tmp_path / "a").write_bytes(b"abc")
    source = file_source(tmp_path / "a")
    os.utime(tmp_path / "a", ns=(0, 1))
    touched = file_source(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"ab")
    os.utime(tmp_path / "a", ns=(0, 1))
    assert len({source, touched, file_source(tmp_path / "a")}) == 3


def test_other_layers_or_another_format_have_entries_of_their_own_and_fewer_layers_share(tmp_path):
    made = store(tmp_path, layers=(1, 2, 3))
    targets = arrays(made)
    made.write({0: entry(made)}, targets)
    assert store(tmp_path, layers=(2, 4)).read(entry(made)) is None
    assert store(tmp_path, layers=(2, 3), form="int8").read(entry(made)) is None
    fewer = store(tmp_path, layers=(3, 1))
    assert fewer.folder == made.folder and fewer.arrays == [1, 2, 3]
    read = fewer.read(entry(made))
    assert set(read) == {1, 3} and equal(read, targets)


def test_no_damage_to_an_entry_goes_unnoticed(tmp_path):
    made = store(tmp_path, layers=[1])
    one, targets = entry(made, samples=800), arrays(made, frames=2)
    made.write({0: one}, targets)
    (path,) = tmp_path.glob("*/*.tar")
    whole = path.read_bytes()
    noticed = 0
    damages = [whole[:length] for length in range(0, len(whole), 13)]
    for position in [*range(0, 512, 5), *range(512, 512 + made.shards.places(one.name)[0].size)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        damages.append(bytes(flipped))
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            assert equal(made.read(one), targets)  # what zip does not need, such as the time in a header
        except UnusableEntry as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > len(damages) / 2
    made.write({0: replace(one, problem="damaged")}, targets)
    assert equal(made.read(one), targets)


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_no_half_entry(tmp_path):
    made = store(tmp_path)
    made.write({0: entry(made)}, arrays(made))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path,) = tmp_path.glob("*/*.tar")
    whole = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 1000, limit[1]))  # the header fits
    try:
        with pytest.raises(InputError) as caught:
            made.write({0: entry(made, "b.wav")}, arrays(made))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    message = str(caught.value)
    assert message.startswith(f"task.target_store={made.folder} cannot be written (File too large)")
    assert "\n" not in message and path.stat().st_size == whole
    assert made.read(entry(made)) and made.read(entry(made, "b.wav")) is None
    made.write({0: entry(made, "b.wav")}, arrays(made))
    assert made.read(entry(made, "b.wav")) and path.stat().st_size == whole


def test_codebooks_are_shared_by_choices_of_layers_and_an_entry_is_read_with_those_that_made_it(tmp_path):
    made = with_codebooks(store(tmp_path, form="pq2"))
    made.write({0: entry(made)}, arrays(made))
    assert store(tmp_path, layers=(3,), form="pq2").read(entry(made))
    other = store(tmp_path, layers=(3, 4), form="pq2")
    assert other.without_codebooks == [4] and other.codebooks[3].digest == made.codebooks[3].digest
    assert store(tmp_path, layers=(2, 3), form="pq4").without_codebooks == [2, 3]
    made.keep_codebooks(3, with_codebooks(store(tmp_path / "other", form="pq2"), seed=1).codebooks[3])
    assert made.read(entry(made))  # the first codebooks stay
    (tmp_path / "codebooks/3.pq2.safetensors").unlink()
    again = with_codebooks(store(tmp_path, form="pq2"), seed=1)
    with pytest.raises(UnusableEntry, match="other codebooks"):
        again.read(entry(again))


def test_a_format_of_codes_refuses_what_codes_cannot_say(tmp_path):
    with pytest.raises(
        InputError, match="task.target_format=pq17 has more codebooks than the teacher has features: 16"
    ):
        store(tmp_path, form="pq17")
    made = with_codebooks(store(tmp_path, layers=[7], form="pq2"))
    broken = torch.randn(2, 12, WIDTH)
    broken[0, 5, 3] = torch.inf
    broken[1, 11, 3] = torch.nan  # in the padding
    assert made.encode({7: broken}, {1: entry(made, "b.wav", samples=2000)})
    with pytest.raises(InputError, match="the teacher's layer 7 for a.wav is not finite") as refused:
        made.encode({7: broken}, {0: entry(made, "a.wav")})
    assert "int8" not in str(refused.value)


def dataset(samples, longest, made, random_crop=True):
    names = Names([f"{index}.wav" for index in range(len(samples))])
    return SpeechDataset(Manifest("/", names, np.array(samples)), longest, 1, random_crop, store=made)


def test_the_plan_counts_the_windows_that_may_be_asked_for_and_the_size_that_they_will_have(tmp_path):
    made = store(tmp_path)
    samples = [40_000, 3000, 80_001]
    assert made.plan(dataset(samples, 40_000, made, random_crop=False))[:2] == (3, 3)
    speech = dataset(samples, 40_000, made)
    windows, missing, size = made.plan(speech)
    assert (windows, missing) == (5, 5)
    for index, count in enumerate([1, 1, 3]):
        for number in range(count):
            one = replace(speech.entry(index, number), digest="0" * 64, source="0" * 30)
            made.write({0: one}, arrays(made, frames=one.frames))
    written = sum(path.stat().st_size for path in tmp_path.glob("*/*.*"))
    assert 0.9 * size < written < 1.1 * size
    assert made.plan(speech) == (5, 0, 0)
    for path in tmp_path.glob("*/*.*"):
        path.unlink()
    assert made.plan(speech)[1] == 5


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path):
    made = store(tmp_path)
    plan = made.plan(dataset([10**15], 10**15, made))
    with pytest.raises(InputError, match="needs 200 TB more for train.tsv, but the disk has") as caught:
        made.check_space(plan[2], "train.tsv")
    assert "\n" not in str(caught.value)


def _write_often(folder, seed):
    made = store(folder)
    for round in range(20):
        targets = arrays(made, batch=4)
        made.write({row: entry(made, f"{row}.wav") for row in range(4)}, targets)
        made.write({0: entry(made, f"{seed} {round}.wav")}, targets)


def test_processes_that_fill_a_store_together_do_not_harm_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    made = store(tmp_path)
    while any(process.is_alive() for process in processes):
        for row in range(4):
            made.read(entry(made, f"{row}.wav"))  # raises if it meets half an entry
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(made.names()) == 4 + 3 * 20 and len(list(tmp_path.glob("*/*.tar"))) == 3
    targets = arrays(made, batch=4)
    assert all(equal(made.read(entry(made, f"{row}.wav")), targets, row) for row in range(4))


def test_fp16_keeps_eleven_bits_and_int8_seven_of_the_largest_value_in_the_frame():
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    values = torch.randn(50, 768, dtype=torch.float64) * sizes
    values[0] = 0
    half, byte = (decode(encode(values.float(), form)).double() for form in ("fp16", "int8"))
    assert ((half - values).abs() <= 2**-11 * values.abs() + 2.0**-25).all()
    largest = values.abs().amax(1, keepdim=True)
    # Half a step of 1/127, and what rounding the scale to eleven bits adds.
    assert ((byte - values).abs() <= largest * (0.5 / 127 + 2**-11) + 127 * 2.0**-25).all()
    assert (byte - values).abs().max() > (half - values).abs().max()


def test_a_value_beyond_fp16_is_refused_and_int8_takes_it(tmp_path):
    made = store(tmp_path, layers=[7])
    huge = torch.full((1, 12, WIDTH), 1e5)
    with pytest.raises(InputError, match="the teacher's layer 7 for a.wav is not finite in task.target_format"):
        made.write({0: entry(made)}, {7: encode(huge, "fp16")})
    assert made.read(entry(made)) is None
    made = store(tmp_path, layers=[7], form="int8")
    made.write({0: entry(made)}, {7: encode(huge, "int8")})
    assert torch.allclose(decode(made.read(entry(made))[7]), huge[0], rtol=1e-3)
