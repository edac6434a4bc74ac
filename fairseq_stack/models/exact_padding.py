"""Lets a HuBERT of transformers give an utterance the same features in a padded batch as alone.

In transformers, the group norm of the first convolution (`extractor_mode=default`) takes its statistics over the
padding too, with and without an attention mask. Students were trained on the statistics of an utterance's own frames.
"""

from typing import Any

import torch
from torch import Tensor, nn


def ignore_padding(model: nn.Module) -> None:
    """Make a HuBERT of transformers ignore padding, in place: a HubertModel or a model with a head on one.

    Names and weights stay, so `save_pretrained` writes a model as before. A batch needs an attention mask, which the
    preprocessor of an export makes. A model without a group norm stays as it is, because it ignores padding already.
    """
    hubert: Any = model.base_model
    first = hubert.feature_extractor.conv_layers[0]
    if not isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
        return
    first.layer_norm = GroupNormOfFrames(first.layer_norm)
    hubert.register_forward_pre_hook(_remember_frames, with_kwargs=True)


def _remember_frames(hubert: Any, inputs: tuple, named: dict) -> None:
    """Give the group norm the frames of each utterance. `hubert` may be a copy, such as one on another GPU."""
    mask = named.get("attention_mask", inputs[1] if len(inputs) > 1 else None)
    first = hubert.feature_extractor.conv_layers[0]
    kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
    first.layer_norm.frames = None if mask is None else (mask.sum(1) - kernel) // stride + 1


class GroupNormOfFrames(nn.GroupNorm):
    """A group norm with one channel in each group, whose statistics come from the first frames of an utterance.

    Args:
        norm: the group norm to replace; its parameters are shared.

    Attributes:
        frames: [B], the frames of each utterance; None if there is no padding.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.frames: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, T]."""
        if self.frames is None:
            return super().forward(x)
        inside = torch.arange(x.size(2), device=x.device) < self.frames[:, None, None]
        count, wide = self.frames[:, None, None], x.float()
        centred = wide - (wide * inside).sum(2, keepdim=True) / count
        variance = (centred * inside).pow(2).sum(2, keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        return normed * self.weight[:, None] + self.bias[:, None]
