"""Normalisation of waveforms, as the models that want it were trained with."""

import torch

# What libraries add to the variance of a waveform that they normalise.
FAIRSEQ_EPSILON = 1e-5  # s3prl's too
TRANSFORMERS_EPSILON = 1e-7


def normalize_waveforms(waveforms, lengths, epsilon=FAIRSEQ_EPSILON):
    """Shift and scale each utterance to zero mean and unit variance over its own samples.

    What fairseq's `task.normalize` does to one waveform before padding (F.layer_norm), for a padded
    batch.

    Args:
        waveforms: [B, S] with zeros behind the end of an utterance.
        lengths: [B], samples.
        epsilon: what is added to the variance.

    Returns:
        [B, S], zeros behind the end.
    """
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < lengths[:, None]
    count = lengths[:, None]
    wide = waveforms.float()
    centred = (wide - wide.sum(1, keepdim=True) / count) * valid
    variance = centred.pow(2).sum(1, keepdim=True) / count
    return (centred * torch.rsqrt(variance + epsilon)).type_as(waveforms)
