"""The dataset: the recordings of a manifest, cropped and padded into batches."""

import copy
import zlib
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.util import register_after_fork

import numpy as np
import torch
from fairseq.data import FairseqDataset
from torch import Tensor

from fairseq_stack.data.audio import read_audio
from fairseq_stack.data.manifest import Manifest
from fairseq_stack.data.windows import count_windows, window_start
from fairseq_stack.data.worker_signals import obey_parent_alone
from fairseq_stack.errors import InputError
from fairseq_stack.targets.store import CNN, Entry, TargetStore, UnusableEntry, file_source, waveform_digest


class SpeechDataset(FairseqDataset):
    """Waveforms for distillation, with the teacher's targets if they are stored.

    A recording that is too long is cut to one of its windows (windows.py). The window, and the order of
    the recordings, depend only on (seed, epoch, utterance). So a resumed run sees the same batches as an
    uninterrupted one, with any number of workers.

    Args:
        manifest: a Manifest.
        max_samples: longer recordings are cropped to this many samples.
        seed: the run's seed.
        random_crop: whether each epoch takes a random window (training), or always the first (validation).
        split: the dataset's name in its batches.
        store: a TargetStore; None without stored targets.
        shortest: recordings of fewer samples are left out.
    """

    can_reuse_epoch_itr_across_epochs = False  # pyright: ignore[reportAssignmentType] a property in fairseq

    def __init__(
        self,
        manifest: Manifest,
        max_samples: int,
        seed: int,
        random_crop: bool,
        split: str = "",
        store: TargetStore | None = None,
        shortest: int = 1,
    ) -> None:
        super().__init__()
        self.split = split
        self.manifest = manifest
        self.max_samples = max_samples
        self.seed = seed
        self.random_crop = random_crop
        self.store = store
        self.sizes = np.minimum(manifest.samples, max_samples)
        # The number of windows that each recording can give.
        counts = np.where(manifest.samples < shortest, 0, count_windows(manifest.samples, max_samples))
        self.window_counts = counts if random_crop else np.minimum(counts, 1)
        self.epoch = 1
        # When a worker starts, because torch lets it end on any SIGTERM before it reads its first recording.
        register_after_fork(self, lambda _: obey_parent_alone())

    def for_validation(self) -> "SpeechDataset":
        """Return a dataset of the same recordings for validation, with the same windows in every epoch."""
        validation = copy.copy(self)
        validation.random_crop = False
        validation.window_counts = np.minimum(self.window_counts, 1)
        return validation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def num_tokens(self, index: int) -> int:
        """Return the samples of the (cropped) recording: the unit of `dataset.max_tokens`."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return self.num_tokens(index)

    def ordered_indices(self) -> np.ndarray:
        """Return indices by length, so that batches hold little padding; equal lengths in random order."""
        order = np.flatnonzero(self.window_counts)
        if self.random_crop:
            order = self._random("order").permutation(order)
        return order[np.argsort(self.sizes[order], kind="stable")]

    def window_number(self, index: int) -> int:
        """Return the number, from 0, of the window of the recording in this epoch."""
        count = int(self.window_counts[index])
        return int(self._random(self.manifest.paths[index]).integers(count)) if count > 1 else 0

    def start(self, index: int, number: int) -> int:
        """Return the first sample of a window; it has `sizes[index]` samples."""
        return window_start(int(self.manifest.samples[index]), int(self.sizes[index]), number)

    def entry(self, index: int, number: int) -> Entry:
        """Return the store's Entry for a window."""
        assert self.store is not None
        return self.store.entry(self.manifest.paths[index], self.start(index, number), int(self.sizes[index]))

    def __getitem__(self, index: int) -> dict:
        """Return the recording's window of this epoch, as `load_window` does."""
        return self.load_window(index, self.window_number(index))

    def load_window(self, index: int, number: int) -> dict:
        """Return one window of a recording, or the problem with it.

        An exception in a worker process would reach the user with two tracebacks. Instead, the problem is part of
        the batch, and the task reports it.
        """
        sample = {"index": index, "window": number, "utterance": self.manifest.paths[index]}
        return {**sample, **(self._stored(index, number, self.store) if self.store else self._waveform(index, number))}

    def _waveform(self, index: int, number: int) -> dict:
        start, size = self.start(index, number), int(self.sizes[index])
        try:
            waveform = read_audio(self.manifest.path(index), start, start + size)
            if len(waveform) != size:
                raise InputError(
                    f"{self.manifest.path(index)} is shorter than the {self.manifest.samples[index]} samples in the"
                    " manifest; prepare the speech again"
                )
        except InputError as error:
            return {"problem": str(error)}
        return {"waveform": torch.from_numpy(waveform)}

    def _stored(self, index: int, number: int, store: TargetStore) -> dict:
        """Return the stored targets, or the Entry to store them in; also the waveform, if it is needed."""
        entry = self.entry(index, number)
        try:
            entry = replace(entry, source=file_source(self.manifest.path(index)))
            if CNN in store.wanted and (stored := store.read(entry)):
                return {"stored": stored}
        except (OSError, UnusableEntry):
            pass  # reading the audio gives a clearer reason
        loaded = self._waveform(index, number)
        if "problem" in loaded:
            return loaded
        entry = replace(entry, digest=waveform_digest(loaded["waveform"]))
        try:
            if stored := store.read(entry):
                return {**loaded, "stored": stored}
        except UnusableEntry as error:
            entry = replace(entry, problem=str(error))
        return {**loaded, "entry": entry}

    def collater(self, samples: Sequence[dict]) -> dict:
        """Return a batch of samples, padded to the longest.

        Returns:
            `split`, `id` [B], `utterances` (B names), `waveforms` [B, S], `lengths` (B ints, in samples),
            `padded_samples` and `audio_samples`, the number of samples with and without padding, and
            `problems`, {name: line} of the recordings that cannot be read. If no recording can be read,
            `utterances` is empty and the waveform is silence, because every process of a distributed
            training must run the model.

            With a store also `stored`, {array: {part: [B', T, ...]}} of the B' utterances in
            `stored_rows`, and `entries`, {row: Entry} of those that must still be stored. If the CNN's
            features are stored for all, `waveforms` is None, because neither model needs them.
        """
        if not samples:
            return {}
        if any("entry" in sample for sample in samples):  # the teacher will process the whole batch
            samples = [
                {**self._waveform(sample["index"], sample["window"]), **sample}
                if "stored" in sample and "waveform" not in sample
                else sample
                for sample in samples
            ]
        problems = {sample["utterance"]: sample["problem"] for sample in samples if "problem" in sample}
        silence = torch.zeros(self.num_tokens(samples[0]["index"]))
        samples = [sample for sample in samples if "problem" not in sample]
        waveforms = [sample["waveform"] for sample in samples if "waveform" in sample]
        lengths = [self.num_tokens(sample["index"]) for sample in samples]
        if not samples:
            waveforms = [silence]
        batch = {
            "split": self.split,
            "id": torch.tensor([sample["index"] for sample in samples]),
            "utterances": [sample["utterance"] for sample in samples],
            "waveforms": _padded(waveforms) if waveforms else None,
            "lengths": lengths or [len(silence)],  # no tensor, which fairseq would copy to the GPU
            "audio_samples": sum(lengths),
            "padded_samples": max(lengths, default=0) * len(lengths),
            "problems": problems,
        }
        if self.store:
            rows = range(len(samples))
            batch["entries"] = {row: samples[row]["entry"] for row in rows if "entry" in samples[row]}
            batch["stored_rows"] = [row for row in rows if "stored" in samples[row]]
            stored = [samples[row]["stored"] for row in batch["stored_rows"]]
            batch["stored"] = {
                array: {part: _padded([each[array][part] for each in stored]) for part in parts}
                for array, parts in (stored[0].items() if stored else ())
            }
        return batch

    def _random(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(name.encode())])


def _padded(sequences: list[Tensor]) -> Tensor:
    """Return tensors [T, ...] of several lengths as one [B, T, ...], padded with zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
