"""HuBERT's positional convolution: 128 frames wide, 16 groups."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from fairseq_stack.models.conv_extractor import as_image, as_image_kernel

# On processors with AMX, oneDNN's bf16 convolution gives wrong numbers for groups of 4, 6 and 8 channels (torch 2.14.1),
# and right ones for 24 and 48.
NARROW = 24


def positions(pos_conv, x, padding):
    """Run fairseq's positional convolution.

    Args:
        pos_conv: fairseq's module: convolution, cut to the input's length, GELU; or several such blocks (data2vec); or
            what `with_batch_norm` makes of it.
        x: [B, T, D].
        padding: [B, T], true behind an utterance, or None.

    Returns:
        [B, T, D].
    """
    for block in pos_conv if isinstance(pos_conv[0], nn.Sequential) else [pos_conv]:
        if isinstance(block[0], nn.BatchNorm1d):
            x, block = block[0](x.transpose(1, 2)).transpose(1, 2), block[1:]
        # Otherwise a block would see what the batch norm or the block before it made of the padding.
        x = x if padding is None else x.masked_fill(padding[:, :, None], 0.0)
        conv, *rest = block
        x = _convolve(x, conv).transpose(1, 2)
        for module in rest:
            x = module(x)
        x = x.transpose(1, 2)
    return x


def with_batch_norm(pos_conv):
    """fairseq's positional convolution of models with conv_pos_batch_norm, made of one without.

    A batch norm comes first, and the convolution has no weight norm. fairseq 0.12.2 does not know the field.
    """
    conv, *rest = pos_conv
    return nn.Sequential(nn.BatchNorm1d(conv.in_channels), nn.utils.remove_weight_norm(conv), *rest)


def _convolve(x, conv):
    """[B, T, D] to [B, T or T + 1, D]."""
    if x.device.type != "cpu":
        return conv(x.transpose(1, 2)).transpose(1, 2)
    for hook in conv._forward_pre_hooks.values():  # torch's weight norm
        hook(conv, None)
    if conv.weight.requires_grad:
        y = SpectralConvolution.apply(x.float(), conv.weight.float(), conv.padding[0], conv.groups).type_as(x)
        return y + conv.bias
    weight, bias, dtype = conv.weight, conv.bias, x.dtype
    if dtype == torch.bfloat16 and weight.size(1) < NARROW:
        x, weight, bias = x.float(), weight.float(), bias.float()
    y = F.conv2d(as_image(x), as_image_kernel(weight), bias, 1, (0, conv.padding[0]), groups=conv.groups)
    return y.squeeze(2).transpose(1, 2).to(dtype)


class SpectralConvolution(torch.autograd.Function):
    """A grouped convolution of [B, T, D] with long kernels [D, D / groups, K], as a product of spectra, in fp32.

    On a CPU forward and backward take a quarter of the time that they take frame by frame.
    """

    @staticmethod
    def forward(ctx, x, weight, padding, groups):
        ctx.frames, ctx.taps, ctx.padding = x.size(1), weight.size(2), padding
        ctx.size = smooth_size(ctx.frames + 2 * padding)
        outputs = ctx.frames + 2 * padding - ctx.taps + 1
        x = torch.fft.rfft(F.pad(x.transpose(1, 2), (padding, 0)), ctx.size).unflatten(1, (groups, -1))
        weight = torch.fft.rfft(weight, ctx.size).unflatten(0, (groups, -1))
        ctx.save_for_backward(x, weight)
        y = torch.einsum("bgif,goif->bgof", x, weight.conj())
        return torch.fft.irfft(y, ctx.size)[..., :outputs].flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = torch.fft.rfft(gradient.transpose(1, 2), ctx.size).unflatten(1, (x.size(1), -1))
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = torch.fft.irfft(torch.einsum("bgof,goif->bgif", gradient, weight), ctx.size)
            to_x = to_x[..., ctx.padding : ctx.padding + ctx.frames].flatten(1, 2).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            to_weight = torch.fft.irfft(torch.einsum("bgof,bgif->goif", gradient.conj(), x), ctx.size)
            to_weight = to_weight[..., : ctx.taps].flatten(0, 1)
        return to_x, to_weight, None, None


def smooth_size(size):
    """The next number that is a product of 2, 3 and 5, of which Fourier transforms are fast."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1
