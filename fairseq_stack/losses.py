"""Frame losses between predictions and teacher features, over valid frames only.

Shapes: B utterances, T frames, D features. Every loss is a sum over frames, so that the sums of
several batches, devices or accumulated micro-batches add up; the caller divides by the frames.
"""

import torch


def valid_frames(frames, length):
    """[B] frame counts to a [B, T] mask that is true on frames and false on padding, T = `length`."""
    return torch.arange(length, device=frames.device) < frames[:, None]


def mse(prediction, target, valid):
    """Squared error, averaged over features and summed over valid frames, in fp32.

    Args:
        prediction, target: [B, T, D].
        valid: [B, T] bool.
    """
    return (prediction.float() - target.float()).pow(2).mean(-1)[valid].sum()
