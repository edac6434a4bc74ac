"""The dataset: recordings of a manifest, cropped and padded into batches."""

import copy
import zlib
from dataclasses import replace
from multiprocessing.util import register_after_fork

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_stack.data.audio import read_audio
from fairseq_stack.data.windows import count_windows, window_start
from fairseq_stack.data.worker_signals import obey_parent_alone
from fairseq_stack.errors import InputError
from fairseq_stack.targets.store import CNN, UnusableEntry, file_source, waveform_digest


class SpeechDataset(FairseqDataset):
    """Waveforms for distillation, with what the teacher makes of them where that is stored.

    A recording that is too long is cut to one of its windows (windows.py). Which one, and the order,
    depend on (seed, epoch, utterance) alone: a resumed run sees what the uninterrupted one would have
    seen, with any number of workers.

    Args:
        manifest: a Manifest.
        max_samples: longer recordings are cropped to this many samples.
        seed: the run's seed.
        random_crop: a window drawn for every epoch (training) or the first (validation).
        split: what batches are to call the dataset.
        store: a TargetStore; None: there are no stored targets.
        shortest: recordings of fewer samples are left out.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, manifest, max_samples, seed, random_crop, split="", store=None, shortest=1):
        super().__init__()
        self.split = split
        self.manifest = manifest
        self.max_samples = max_samples
        self.seed = seed
        self.random_crop = random_crop
        self.store = store
        self.sizes = np.minimum(manifest.samples, max_samples)
        # How many windows of each recording can be asked for.
        counts = np.where(manifest.samples < shortest, 0, count_windows(manifest.samples, max_samples))
        self.window_counts = counts if random_crop else np.minimum(counts, 1)
        self.epoch = 1
        # At a worker's birth: torch gives it a handler that dies of any SIGTERM before it reads its first recording.
        register_after_fork(self, lambda _: obey_parent_alone())

    def for_validation(self):
        """The same recordings as validation takes them, whatever epoch the training is in."""
        validation = copy.copy(self)
        validation.random_crop = False
        validation.window_counts = np.minimum(self.window_counts, 1)
        return validation

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.sizes)

    def num_tokens(self, index):
        """Samples of the (cropped) recording: the unit of `dataset.max_tokens`."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices):
        return self.sizes[indices]

    def size(self, index):
        return self.num_tokens(index)

    def ordered_indices(self):
        """Indices by length, equal lengths in an order drawn for the epoch, so that batches hold little padding."""
        order = np.flatnonzero(self.window_counts)
        if self.random_crop:
            order = self._random("order").permutation(order)
        return order[np.argsort(self.sizes[order], kind="stable")]

    def window_number(self, index):
        """Which window of the recording this epoch takes, counted from 0."""
        count = int(self.window_counts[index])
        return int(self._random(self.manifest.paths[index]).integers(count)) if count > 1 else 0

    def start(self, index, number):
        """The first sample of a window; it has `sizes[index]` samples."""
        return window_start(int(self.manifest.samples[index]), int(self.sizes[index]), number)

    def entry(self, index, number):
        """The store's Entry for a window."""
        return self.store.entry(self.manifest.paths[index], self.start(index, number), int(self.sizes[index]))

    def __getitem__(self, index):
        """The recording's window of this epoch, as `load_window` gives it."""
        return self.load_window(index, self.window_number(index))

    def load_window(self, index, number):
        """One window of a recording, or the reason why there is none.

        An exception in a worker process would reach the user wrapped in two tracebacks; the reason
        travels with the batch instead and the task reports it.
        """
        sample = {"index": index, "window": number, "utterance": self.manifest.paths[index]}
        return {**sample, **(self._stored(index, number) if self.store else self._waveform(index, number))}

    def _waveform(self, index, number):
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

    def _stored(self, index, number):
        """The stored targets or the Entry that is to hold them, and the waveform where somebody needs it."""
        entry = self.entry(index, number)
        try:
            entry = replace(entry, source=file_source(self.manifest.path(index)))
            if CNN in self.store.wanted and (stored := self.store.read(entry)):
                return {"stored": stored}
        except (OSError, UnusableEntry):
            pass  # whoever reads the audio tells more
        loaded = self._waveform(index, number)
        if "problem" in loaded:
            return loaded
        entry = replace(entry, digest=waveform_digest(loaded["waveform"]))
        try:
            if stored := self.store.read(entry):
                return {**loaded, "stored": stored}
        except UnusableEntry as error:
            entry = replace(entry, problem=str(error))
        return {**loaded, "entry": entry}

    def collater(self, samples):
        """Pad to the longest.

        Returns:
            `split`, `id` [B], `utterances` (B names), `waveforms` [B, S], `lengths` [B] in samples,
            `padded_samples` and `audio_samples`, how many samples that is with and without padding, and
            `problems`, {name: line} of the recordings that could not be read. Where none could,
            `utterances` is empty and the waveform is silence, because processes that train together
            must each run the model on something.

            With a store also `stored`, {array: {part: [B', T, ...]}} of the B' utterances in
            `stored_rows`, and `entries`, {row: Entry} of those that are to be stored. Where the CNN's
            features are all there, nobody needs waveforms, and they are None.
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
            "lengths": torch.tensor(lengths or [len(silence)]),
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

    def _random(self, name):
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(name.encode())])


def _padded(sequences):
    """Tensors [T, ...] of several lengths to one [B, T, ...], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
