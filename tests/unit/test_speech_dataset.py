"""Batches depend on (seed, epoch, utterance) and on nothing else."""

import numpy as np
import soundfile
import torch

from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.data.manifest import read_manifest


def dataset(speech, seed=1, epoch=1, random_crop=True, max_samples=4000):
    made = SpeechDataset(read_manifest(speech / "train.tsv"), max_samples, seed, random_crop)
    made.set_epoch(epoch)
    return made


def test_a_crop_is_a_piece_of_its_recording_and_can_be_drawn_again(speech):
    first, again = dataset(speech)[3], dataset(speech)[3]
    assert torch.equal(first["waveform"], again["waveform"]) and len(first["waveform"]) == 4000
    whole, _ = soundfile.read(speech / f"{first['utterance']}", dtype="float32")
    pieces = np.lib.stride_tricks.sliding_window_view(whole, 4000)
    assert (pieces == first["waveform"].numpy()).all(axis=1).any()


def test_every_epoch_and_seed_has_crops_and_an_order_of_its_own(speech):
    original = dataset(speech)
    for other in (dataset(speech, epoch=2), dataset(speech, seed=2)):
        assert not all(torch.equal(original[index]["waveform"], other[index]["waveform"]) for index in range(24))
        assert original.ordered_indices().tolist() != other.ordered_indices().tolist()
    assert original.ordered_indices().tolist() == dataset(speech).ordered_indices().tolist()


def test_validation_hears_the_same_beginning_of_each_recording_in_every_epoch(speech):
    epochs = [dataset(speech, epoch=epoch, random_crop=False) for epoch in (1, 2)]
    for index in range(24):
        waveform = epochs[0][index]["waveform"]
        whole, _ = soundfile.read(speech / epochs[0].manifest.paths[index], dtype="float32")
        assert np.array_equal(waveform.numpy(), whole[:4000])
        assert torch.equal(waveform, epochs[1][index]["waveform"])


def test_the_order_goes_by_length_so_that_batches_hold_little_padding(speech):
    made = dataset(speech, max_samples=100_000)
    lengths = made.sizes[made.ordered_indices()]
    assert (np.diff(lengths) >= 0).all() and sorted(made.ordered_indices()) == list(range(24))


def test_a_batch_is_padded_with_zeros_and_knows_its_lengths(speech):
    made = dataset(speech, max_samples=100_000)
    batch = made.collater([made[0], made[1]])
    lengths = [made.num_tokens(0), made.num_tokens(1)]
    assert batch["lengths"] == lengths and batch["waveforms"].shape == (2, max(lengths))
    for row, length in enumerate(lengths):
        assert torch.equal(batch["waveforms"][row, :length], made[row]["waveform"])
        assert not batch["waveforms"][row, length:].any()
    assert batch["problems"] == {}


def test_a_recording_that_cannot_be_read_is_named_in_the_batch(speech, tmp_path):
    soundfile.write(tmp_path / "good.wav", np.zeros(5000), 16_000)
    soundfile.write(tmp_path / "slow.wav", np.zeros(5000), 8_000)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\ngood.wav\t5000\nslow.wav\t5000\ntext.wav\t5000\n")
    made = SpeechDataset(read_manifest(tmp_path / "train.tsv"), 5000, 1, random_crop=False)
    batch = made.collater([made[0], made[1], made[2]])
    assert batch["utterances"] == ["good.wav"] and len(batch["waveforms"]) == 1
    assert list(batch["problems"]) == ["slow.wav", "text.wav"]
    slow, text = batch["problems"].values()
    assert "slow.wav" in slow and "8000 Hz" in slow
    assert "text.wav" in text and "\n" not in text


def test_a_batch_without_any_readable_recording_is_silence_of_nobody(speech, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\ntext.wav\t5000\n")
    made = SpeechDataset(read_manifest(tmp_path / "train.tsv"), 4000, 1, random_crop=True)
    batch = made.collater([made[0]])
    assert batch["utterances"] == [] and list(batch["problems"]) == ["text.wav"]
    assert batch["waveforms"].shape == (1, 4000) and not batch["waveforms"].any() and batch["lengths"] == [4000]
