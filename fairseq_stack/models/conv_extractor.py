"""HuBERT's CNN, waveforms to features, laid out so that it runs fast.

The parameters and the mathematics are those of fairseq's ConvFeatureExtractionModel; the way there differs:

- Features are kept as [B, T, C], which is how matrix products like them.
- The group norm of the `default` mode is folded into the kernels of the first convolution. With a single input
  channel, mean and variance of each output channel follow from the mean and the covariance of the waveform's
  windows, ten by ten numbers. So nothing passes over the largest tensor of the whole model for the norm's sake.
- The statistics are those of an utterance's own frames. fairseq, transformers and s3prl let the norm run over the
  padding too, so that features depend on what else is in the batch. Without padding all agree.
- GELU belongs to the convolution behind it: kept is its input alone, and its output is computed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import ConvFeatureExtractionModel

from fairseq_stack.models.conv_geometry import frames_from_samples


class ConvExtractor(ConvFeatureExtractionModel):
    """fairseq's extractor with a forward pass of its own.

    Args:
        conv_layers: [(channels, kernel, stride), ...].
        mode: `default` (group norm in the first layer) or `layer_norm` (over the channels in every layer).
        conv_bias: whether the convolutions have biases.
    """

    def __init__(self, conv_layers, mode, conv_bias):
        super().__init__(conv_layers=conv_layers, mode=mode, conv_bias=conv_bias)
        self.shapes = conv_layers
        self.has_group_norm = mode == "default"

    def forward(self, waveforms, lengths):
        """[B, S] samples and [B] lengths to [B, C, T] features."""
        first, *others = self.conv_layers
        if self.has_group_norm:
            frames = frames_from_samples(lengths, self.shapes[:1])
            x = normed_convolution(waveforms, frames, first[0], first[2])
            for block in others:
                x = convolution(x, block[0], after_gelu=True)
        else:
            x = layer_norm(convolution(waveforms[:, :, None], first[0]), first)
            for block in others:
                x = layer_norm(convolution(x, block[0], after_gelu=True), block)
        return F.gelu(x).transpose(1, 2)


def layer_norm(x, block):
    """[B, T, C] through the norm over the channels in a layer of fairseq's `layer_norm` mode.

    fairseq copies x to fp32 and keeps the copy for the backward pass. torch's kernels compute in fp32 inside, whatever
    the precision of x is. Autocast would make the copy too.
    """
    norm = block[2][1]  # it stands between two transpositions
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def normed_convolution(waveforms, frames, conv, norm):
    """The group norm of a convolution of waveforms.

    Args:
        waveforms: [B, S], samples.
        frames: [B], how many frames of each utterance count for the norm.
        conv: the convolution, of one input channel and C output channels, without padding. A bias has no effect,
            since the norm takes it away.
        norm: the affine group norm, with one channel in each group.

    Returns:
        [B, T, C].
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    # The norm takes an offset away. Before, a quiet recording would lose its digits beside it.
    samples = (frames - 1) * stride + kernel
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < samples[:, None]
    waveforms = waveforms.float()
    windows = (waveforms - (waveforms * valid).sum(1, keepdim=True) / samples[:, None]).unfold(1, kernel, stride)
    kernels, bias = normed_kernels(windows, frames, conv.weight[:, 0], norm)
    dtype = autocast_dtype(waveforms, conv.weight.dtype)
    return torch.baddbmm(bias[:, None].to(dtype), windows.to(dtype), kernels.transpose(1, 2).to(dtype))


def normed_kernels(windows, frames, weight, norm):
    """The kernels and biases, for each utterance, that convolve and normalise at once.

    In float64: where a kernel lets through a band in which there is hardly any energy, its output's variance is a
    small difference of large numbers.

    Args:
        windows: [B, T, K], the waveform's.
        frames: [B], how many of them count.
        weight: [C, K].
        norm: an affine group norm over C channels, one in each group.

    Returns:
        [B, C, K] and [B, C], float64.
    """
    valid = torch.arange(windows.size(1), device=windows.device) < frames[:, None]
    windows, count, weight = windows.double() * valid[:, :, None], frames[:, None, None], weight.double()
    mean = windows.sum(1, keepdim=True) / count
    centred = (windows - mean) * valid[:, :, None]
    covariance = centred.transpose(1, 2) @ centred / count
    variance = ((weight @ covariance) * weight).sum(2)
    kernels = weight * (norm.weight.double() * torch.rsqrt(variance + norm.eps))[:, :, None]
    return kernels, norm.bias.double() - (kernels * mean).sum(2)


def convolution(x, conv, after_gelu=False):
    """[B, T, C] to [B, T', C'], a convolution without padding, of GELU(x) if it comes after one."""
    dtype = autocast_dtype(x, conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return ChannelsLastConvolution.apply(x.to(dtype), conv.weight.to(dtype), bias, conv.stride[0], after_gelu)


class ChannelsLastConvolution(torch.autograd.Function):
    """A convolution of [B, T, C] whose weight's gradient is a matrix product, and which keeps no output of a GELU.

    On a CPU oneDNN takes up to six times as long for the gradient of the weight in this layout.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, after_gelu):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias, ctx.after_gelu = stride, bias is not None, after_gelu
        image = as_image(F.gelu(x) if after_gelu else x)
        return F.conv2d(image, as_image_kernel(weight), bias, (1, stride)).squeeze(2).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            to_weight = weight_gradient(gradient, x, weight.size(2), ctx.stride, ctx.after_gelu)
        if ctx.has_bias:
            to_bias = gradient.sum((0, 1))
        if ctx.needs_input_grad[0]:
            # torch.nn.grad.conv2d_input would not see the layout of x, and copy twice.
            to_x, _, _ = torch.ops.aten.convolution_backward(
                as_image(gradient), as_image(x), as_image_kernel(weight), None, (1, ctx.stride), (0, 0), (1, 1), False,
                (0, 0), 1, (True, False, False),
            )  # fmt: skip
            to_x = to_x.squeeze(2).transpose(1, 2)
            if ctx.after_gelu:
                torch.ops.aten.gelu_backward(to_x, x, grad_input=to_x)  # in place
        return to_x, to_weight, to_bias, None, None


def weight_gradient(gradient, x, taps, stride, after_gelu):
    """[B, T', C'] and the convolution's input [B, T, C] to [C', C, K], one utterance at a time to save memory."""
    found = []
    for ours, theirs in zip(gradient, x):
        heard = F.gelu(theirs) if after_gelu else theirs
        found.append(torch.stack([ours.t() @ heard[tap::stride][: len(ours)] for tap in range(taps)], dim=2))
    return torch.stack(found).sum(0)


def as_image(x):
    """[B, T, C] as the image [B, C, 1, T] in torch's channels-last layout; no copy."""
    return x.transpose(1, 2).unsqueeze(2)


def as_image_kernel(weight):
    """[C', C, K] as the channels-last kernel [C', C, 1, K]."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def autocast_dtype(x, dtype):
    """What autocast computes matrix products of `x` in where it is on, else `dtype`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
