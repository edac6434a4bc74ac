"""Dropout with fast random numbers on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_RANGE = 1 << 16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Apply dropout as F.dropout does. On a CPU the probability is rounded to a multiple of 2 ** -16 to save time."""
    if not training or x.is_cuda or not 0 < probability < 1:
        return F.dropout(x, probability, training)
    return Dropout.apply(x, *kept(x.shape, probability))


class Dropout(torch.autograd.Function):
    """x * keep * scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return masked(x, keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return masked(gradient, keep).mul_(ctx.scale), None, None


def kept(shape: Sequence[int], probability: float) -> tuple[Tensor, float]:
    """Draw the entries that dropout keeps on a CPU, and return them with their factor.

    Each 64-bit random number of torch's generator gives four 16-bit numbers, one for each entry. This takes about a
    fifth of the time of torch's own dropout.

    Args:
        shape: of the mask.
        probability: of dropping an entry, between 0 and 1.

    Returns:
        an int16 tensor, 1 for the entries to keep and 0 for the others, and the number by which dropout multiplies
        them.
    """
    dropped = min(round(probability * _RANGE), _RANGE - 1)
    count = torch.Size(shape).numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    numbers = drawn.view(torch.int16)[:count].view(shape)
    return numbers.ge_(dropped - _RANGE // 2), _RANGE / (_RANGE - dropped)


def masked(x: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x * keep, with the mask of `kept`. `out` is the tensor to write to, which may be x.

    Half-precision numbers are multiplied by 0 or 1 as integers: a product of two types would copy the mask first.
    """
    out = torch.empty_like(x) if out is None else out
    if x.element_size() == keep.element_size():
        torch.mul(x.view(keep.dtype), keep, out=out.view(keep.dtype))
        return out
    return torch.mul(x, keep, out=out)
