"""Which frames of the student's input are masked."""

import numpy as np
import torch


def span_mask(frames, probability, length, seeds):
    """Choose spans of frames to mask, as wav2vec 2.0 and HuBERT do.

    An utterance of n frames gets `probability` * n / `length` spans (rounded up or down at random),
    which start at different frames and may overlap. No span covers a whole utterance.

    Args:
        frames: [B], the frames of each utterance.
        probability: the share of frames that would be masked if spans did not overlap.
        length: frames of a span.
        seeds: B sequences of ints; nothing else is random, so that the same seeds give the same mask.

    Returns:
        [B, T] bool on the device of `frames`, true on masked frames, T = the most frames.
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
