"""HuBERT's positional convolution: 128 frames wide, 16 groups."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fairseq_stack.models.conv_extractor import as_image, as_image_kernel, autocast_dtype

# On processors with AMX, oneDNN's bf16 convolution gives wrong results for groups of 4, 6 and 8 channels and
# correct ones for 24 and 48 (torch 2.14.1).
NARROW = 24

# Frames of the output that one row of a matrix product gives, see `blockwise_convolution`. The product has
# (BLOCK + K - 1) / K times the convolution's operations, and its input (BLOCK + K - 1) / BLOCK times the numbers.
BLOCK = 16


def positions(pos_conv: nn.Sequential, x: Tensor, padding: Tensor | None) -> Tensor:
    """Run fairseq's positional convolution.

    Args:
        pos_conv: fairseq's module (convolution, cut to the input's length, GELU), several such blocks (data2vec), or
            the result of `with_batch_norm`.
        x: [B, T, D].
        padding: [B, T], true after the end of an utterance, or None.

    Returns:
        [B, T, D].
    """
    blocks: Any = pos_conv if isinstance(pos_conv[0], nn.Sequential) else [pos_conv]
    for block in blocks:
        if isinstance(block[0], nn.BatchNorm1d):
            x, block = block[0](x.transpose(1, 2)).transpose(1, 2), block[1:]
        # A batch norm or an earlier block has changed the zeros of the padding, and this block must not read that.
        x = x if padding is None else x.masked_fill(padding[:, :, None], 0.0)
        conv, *rest = block
        x = _convolve(x, conv).transpose(1, 2)
        for module in rest:
            x = module(x)
        x = x.transpose(1, 2)
    return x


def with_batch_norm(pos_conv: nn.Sequential) -> nn.Sequential:
    """Convert fairseq's positional convolution to that of models with conv_pos_batch_norm.

    A batch norm comes first, and the convolution has no weight norm. fairseq 0.12.2 does not know the field.
    """
    conv, *rest = pos_conv
    assert isinstance(conv, nn.Conv1d)
    return nn.Sequential(nn.BatchNorm1d(conv.in_channels), nn.utils.remove_weight_norm(conv), *rest)


def _convolve(x: Tensor, conv: Any) -> Tensor:
    """Apply `conv`, the nn.Conv1d of a positional convolution, to x [B, T, D]: [B, T or T + 1, D]."""
    for hook in conv._forward_pre_hooks.values():  # torch's weight norm
        hook(conv, None)
    if x.device.type != "cpu":
        return _on_gpu(x, conv)
    if conv.weight.requires_grad:
        y = SpectralConvolution.apply(x.float(), conv.weight.float(), conv.padding[0], conv.groups).type_as(x)
        return y + conv.bias
    weight, bias, dtype = conv.weight, conv.bias, x.dtype
    if dtype == torch.bfloat16 and weight.size(1) < NARROW:
        x, weight, bias = x.float(), weight.float(), bias.float()
    y = F.conv2d(as_image(x), as_image_kernel(weight), bias, 1, (0, conv.padding[0]), groups=conv.groups)
    return y.squeeze(2).transpose(1, 2).to(dtype)


class PositionalConv1d(nn.Module):
    """The frozen nn.Conv1d of another library's positional convolution, which is slow on a GPU by itself."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution to x [B, D, T]."""
        return self.conv(x) if x.device.type == "cpu" else _on_gpu(x.transpose(1, 2), self.conv).transpose(1, 2)


def _on_gpu(x, conv):
    dtype = autocast_dtype(x, x.dtype)
    y = blockwise_convolution(x.to(dtype), conv.weight.to(dtype), conv.padding[0], conv.groups)
    return y + conv.bias.to(dtype)


def blockwise_convolution(x: Tensor, weight: Tensor, padding: int, groups: int) -> Tensor:
    """A grouped convolution of [B, T, D] with long kernels [D, D / groups, K], as one matrix product for each group.

    A row of the product's input holds the BLOCK + K - 1 frames that BLOCK frames of the output depend on. Its matrix
    holds the kernel BLOCK times, shifted by one more frame for each frame of the output. On an H100, cuDNN does not use
    the tensor cores for groups of 48 channels: HuBERT Base's convolution took longer than its twelve layers.
    """
    taps = weight.size(2)
    width, outputs = BLOCK + taps - 1, x.size(1) + 2 * padding - taps + 1
    blocks = -(-outputs // BLOCK)
    x = F.pad(x, (0, 0, padding, blocks * BLOCK + taps - 1 - padding - x.size(1)))
    rows = x.unflatten(2, (groups, -1)).unfold(1, width, BLOCK)  # [B, blocks, groups, C, width]
    rows = rows.permute(2, 0, 1, 4, 3).flatten(3).flatten(1, 2)
    # Kernels that are followed by BLOCK zeros, one after another, and cut into rows that are one shorter
    shifted = F.pad(weight, (0, BLOCK)).unsqueeze(2).expand(-1, -1, BLOCK, -1).flatten(2)[:, :, : BLOCK * width]
    matrices = shifted.unflatten(2, (BLOCK, width)).unflatten(0, (groups, -1))  # [groups, C', C, BLOCK, width]
    matrices = matrices.permute(0, 4, 2, 3, 1).flatten(3).flatten(1, 2)
    y = torch.bmm(rows, matrices).unflatten(1, (-1, blocks)).unflatten(3, (BLOCK, -1))
    return y.permute(1, 2, 3, 0, 4).flatten(3).flatten(1, 2)[:, :outputs]


class SpectralConvolution(torch.autograd.Function):
    """A grouped convolution of [B, T, D] with long kernels [D, D / groups, K], computed from spectra in fp32.

    On a CPU, forward and backward pass take a quarter of the time of a direct convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, groups: int) -> Tensor:
        ctx.frames, ctx.taps, ctx.padding = x.size(1), weight.size(2), padding
        ctx.size = smooth_size(ctx.frames + 2 * padding)
        outputs = ctx.frames + 2 * padding - ctx.taps + 1
        x = torch.fft.rfft(F.pad(x.transpose(1, 2), (padding, 0)), ctx.size).unflatten(1, (groups, -1))
        weight = torch.fft.rfft(weight, ctx.size).unflatten(0, (groups, -1))
        ctx.save_for_backward(x, weight)
        y = torch.einsum("bgif,goif->bgof", x, weight.conj())
        return torch.fft.irfft(y, ctx.size)[..., :outputs].flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = torch.fft.rfft(gradient.transpose(1, 2), ctx.size).unflatten(1, (x.size(1), -1))
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.fft.irfft(torch.einsum("bgof,goif->bgif", gradient, weight), ctx.size)
            x_gradient = x_gradient[..., ctx.padding : ctx.padding + ctx.frames].flatten(1, 2).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.fft.irfft(torch.einsum("bgof,bgif->goif", gradient.conj(), x), ctx.size)
            weight_gradient = weight_gradient[..., : ctx.taps].flatten(0, 1)
        return x_gradient, weight_gradient, None, None


def smooth_size(size: int) -> int:
    """The smallest product of 2s, 3s and 5s that is at least `size`; Fourier transforms of such sizes are fast."""
    while True:
        remainder = size
        for factor in (2, 3, 5):
            while remainder % factor == 0:
                remainder //= factor
        if remainder == 1:
            return size
        size += 1
