"""The mask of the student's input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def span_mask(frames: Tensor, probability: float, length: int, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Return a mask of randomly chosen spans of frames, as in wav2vec 2.0 and HuBERT.

    An utterance of n frames gets `probability` * n / `length` spans (rounded up or down at random),
    which start at different frames and may overlap. No span covers a whole utterance.

    Args:
        frames: [B], the frames of each utterance.
        probability: the share of frames that would be masked if spans did not overlap.
        length: frames of a span.
        seeds: B sequences of ints. The same seeds give the same mask.

    Returns:
        [B, T] bool on the device of `frames`, true on masked frames. T is the largest of `frames`.
    """
    counts = frames.tolist()
    mask = torch.zeros(len(counts), max(counts), dtype=torch.bool)
    for row, (count, seed) in enumerate(zip(counts, seeds)):
        random = np.random.default_rng(seed)
        span = min(length, count - 1)
        starts = random.permutation(count - span + 1)
        for start in starts[: int(probability * count / length + random.random())]:
            mask[row, start : start + span] = True
    return mask.to(frames.device)
