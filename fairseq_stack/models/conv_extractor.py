"""HuBERT's CNN, waveforms to features, laid out so that it runs fast.

The parameters and the mathematics are those of fairseq's ConvFeatureExtractionModel; the way there differs:

- Features are kept as [B, T, C], which is how matrix products like them.
- The group norm of the `default` mode is folded into the kernels of the first convolution. With a single input
  channel, mean and variance of each output channel follow from the mean and the covariance of the waveform's
  windows, ten by ten numbers. So nothing passes over the largest tensor of the whole model for the norm's sake.
- The statistics are those of an utterance's own frames. fairseq, transformers and s3prl let the norm run over the
  padding too, so that features depend on what else is in the batch. Without padding all agree.
- The first layer's input to GELU is computed again in the backward pass instead of being kept.
"""

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import ConvFeatureExtractionModel

from fairseq_stack.lengths import frames_from_samples


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
        if self.has_group_norm:
            conv, _, norm, _ = self.conv_layers[0]
            frames = frames_from_samples(lengths, self.shapes[:1])
            x = normed_convolution(waveforms, frames, conv, norm)
        else:
            x = self.layer_normed(self.conv_layers[0], waveforms[:, :, None])
        for block in self.conv_layers[1:]:
            x = F.gelu(convolution(x, block[0])) if self.has_group_norm else self.layer_normed(block, x)
        return x.transpose(1, 2)

    @staticmethod
    def layer_normed(block, x):
        """One layer of the `layer_norm` mode, [B, T, C] to [B, T', C']."""
        conv, _, (_, norm, _), _ = block
        return F.gelu(norm(convolution(x, conv)))


def normed_convolution(waveforms, frames, conv, norm):
    """GELU of the group norm of a convolution of waveforms.

    Args:
        waveforms: [B, S], samples.
        frames: [B], how many frames of each utterance count for the norm.
        conv: the convolution, of one input channel and C output channels, without padding. A bias has no effect,
            since the norm takes it away.
        norm: the affine group norm, with one channel in each group.

    Returns:
        [B, T, C].
    """
    windows = waveforms.unfold(1, conv.kernel_size[0], conv.stride[0])
    kernels, bias = normed_kernels(windows, frames, conv.weight[:, 0], norm)
    dtype = autocast_dtype(waveforms, conv.weight.dtype)
    return WindowsToFeatures.apply(windows.to(dtype), kernels.to(dtype), bias.to(dtype))


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


class WindowsToFeatures(torch.autograd.Function):
    """gelu(windows [B, T, K] @ kernels [B, C, K] + bias [B, C]), which keeps nothing of the size of its output."""

    @staticmethod
    def forward(ctx, windows, kernels, bias):
        ctx.save_for_backward(windows, kernels, bias)
        return F.gelu(torch.baddbmm(bias[:, None], windows, kernels.transpose(1, 2)))

    @staticmethod
    def backward(ctx, gradient):
        windows, kernels, bias = ctx.saved_tensors
        before = torch.baddbmm(bias[:, None], windows, kernels.transpose(1, 2))
        gradient = torch.ops.aten.gelu_backward(gradient, before)
        return None, gradient.transpose(1, 2) @ windows, gradient.sum(1)


def convolution(x, conv):
    """[B, T, C] to [B, T', C'], a convolution without padding."""
    dtype = autocast_dtype(x, conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return ChannelsLastConvolution.apply(x.to(dtype), conv.weight.to(dtype), bias, conv.stride[0])


class ChannelsLastConvolution(torch.autograd.Function):
    """A convolution of [B, T, C] whose weight's gradient is a matrix product.

    On a CPU oneDNN takes up to six times as long for the gradient of the weight in this layout.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return F.conv2d(as_image(x), as_image_kernel(weight), bias, (1, stride)).squeeze(2).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        frames, taps = gradient.size(1), weight.size(2)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            image = as_image(x)
            to_x = torch.nn.grad.conv2d_input(image.shape, as_image_kernel(weight), as_image(gradient), (1, ctx.stride))
            to_x = to_x.squeeze(2).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            seen = [x[:, tap :: ctx.stride][:, :frames] for tap in range(taps)]
            to_weight = torch.stack([weight_gradient(gradient, inputs) for inputs in seen], dim=2)
        if ctx.has_bias:
            to_bias = gradient.sum((0, 1))
        return to_x, to_weight, to_bias, None


def weight_gradient(gradient, inputs):
    """[B, T, C'] and [B, T, C] to [C', C], the sum over utterances and frames of their outer products."""
    return torch.stack([ours.t() @ theirs for ours, theirs in zip(gradient, inputs)]).sum(0)


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
