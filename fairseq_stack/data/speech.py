"""The dataset: recordings of a manifest, cropped and padded into batches."""

import zlib
from multiprocessing.util import register_after_fork

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_stack.data.audio import read_audio
from fairseq_stack.errors import InputError
from fairseq_stack.preemption import obey_parent_alone


class SpeechDataset(FairseqDataset):
    """Waveforms for distillation.

    Crops and the order depend on (seed, epoch, utterance) alone: a resumed run sees what the
    uninterrupted one would have seen, with any number of workers.

    Args:
        manifest: a Manifest.
        max_samples: longer recordings are cropped to this many samples.
        seed: the run's seed.
        random_crop: a new crop in every epoch (training) or the beginning (validation).
        split: what batches are to call the dataset.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, manifest, max_samples, seed, random_crop, split="train"):
        super().__init__()
        self.split = split
        self.manifest = manifest
        self.max_samples = max_samples
        self.seed = seed
        self.random_crop = random_crop
        self.sizes = np.minimum(manifest.samples, max_samples)
        self.epoch = 1
        # At a worker's birth: torch gives it a handler that dies of any SIGTERM before it reads its first recording.
        register_after_fork(self, lambda _: obey_parent_alone())

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
        order = self._random("order").permutation(len(self)) if self.random_crop else np.arange(len(self))
        return order[np.argsort(self.sizes[order], kind="stable")]

    def __getitem__(self, index):
        """One cropped waveform, or the reason why there is none.

        An exception in a worker process would reach the user wrapped in two tracebacks; the reason
        travels with the batch instead and the task reports it.
        """
        utterance = self.manifest.paths[index]
        size, spare = int(self.sizes[index]), int(self.manifest.samples[index] - self.sizes[index])
        start = int(self._random(utterance).integers(spare + 1)) if self.random_crop and spare else 0
        try:
            waveform = read_audio(self.manifest.path(index), start, start + size)
            if len(waveform) != size:
                raise InputError(
                    f"{self.manifest.path(index)} is shorter than the {self.manifest.samples[index]} samples in the"
                    " manifest; prepare the speech again"
                )
        except InputError as error:
            return {"index": index, "utterance": utterance, "problem": str(error)}
        return {"index": index, "utterance": utterance, "waveform": torch.from_numpy(waveform)}

    def collater(self, samples):
        """Pad to the longest.

        Returns:
            `split`, `id` [B], `utterances` (B names), `waveforms` [B, S], `lengths` [B] in samples, and
            `problems`, {name: line} of the recordings that could not be read. Where none could,
            `utterances` is empty and the waveform is silence, because processes that train together
            must each run the model on something.
        """
        if not samples:
            return {}
        problems = {sample["utterance"]: sample["problem"] for sample in samples if "problem" in sample}
        silence = torch.zeros(self.num_tokens(samples[0]["index"]))
        samples = [sample for sample in samples if "waveform" in sample]
        waveforms = [sample["waveform"] for sample in samples] or [silence]
        return {
            "split": self.split,
            "id": torch.tensor([sample["index"] for sample in samples]),
            "utterances": [sample["utterance"] for sample in samples],
            "waveforms": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "lengths": torch.tensor([len(waveform) for waveform in waveforms]),
            "problems": problems,
        }

    def _random(self, name):
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(name.encode())])
