"""Normalisation of waveforms, for models that were trained on normalised waveforms."""

import torch
from torch import Tensor

# The libraries add these numbers to the variance of a waveform that they normalise.
FAIRSEQ_EPSILON = 1e-5  # s3prl too
TRANSFORMERS_EPSILON = 1e-7


def normalize_waveforms(waveforms: Tensor, lengths: Tensor, epsilon: float = FAIRSEQ_EPSILON) -> Tensor:
    """Shift and scale each utterance to zero mean and unit variance over its own samples.

    fairseq's `task.normalize` does this to each waveform before padding (F.layer_norm). This function
    does it to a padded batch.

    Args:
        waveforms: [B, S] with zeros after the end of an utterance.
        lengths: [B], samples.
        epsilon: added to the variance.

    Returns:
        [B, S], with zeros after the end.
    """
    lengths = lengths.to(waveforms.device, non_blocking=True)
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < lengths[:, None]
    count = lengths[:, None]
    wide = waveforms.float()
    centred = (wide - wide.sum(1, keepdim=True) / count) * valid
    variance = centred.pow(2).sum(1, keepdim=True) / count
    return (centred * torch.rsqrt(variance + epsilon)).type_as(waveforms)
