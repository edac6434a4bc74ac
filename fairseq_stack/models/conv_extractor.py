"""HuBERT's CNN, from waveforms to features, with a fast forward and backward pass.

The parameters and the mathematics are those of fairseq's ConvFeatureExtractionModel. The computation differs:

- Features stay [B, T, C], the layout in which matrix products are fast.
- The group norm of the `default` mode is folded into the kernels of the first convolution. With a single input
  channel, mean and variance of each output channel follow from the mean and the covariance of the waveform's
  windows, ten by ten numbers. So the norm needs no pass over the largest tensor of the model.
- The norm's statistics come from an utterance's own frames. fairseq, transformers and s3prl include the padding, so
  that features depend on the other utterances of the batch. Without padding all give the same features.
- GELU is computed inside the convolution after it. Only its input is kept, and the backward pass computes its output
  again. In half precision on a GPU both are kept, because this pass takes as long as the products of some layers there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import ConvFeatureExtractionModel
from torch import Tensor, nn

from fairseq_stack.models.conv_geometry import ConvLayers, frames_from_samples


class ConvExtractor(ConvFeatureExtractionModel):
    """fairseq's extractor with its own forward pass.

    Args:
        conv_layers: [(channels, kernel, stride), ...].
        mode: `default` (group norm in the first layer) or `layer_norm` (over the channels in every layer).
        conv_bias: whether the convolutions have biases.
    """

    def __init__(self, conv_layers: ConvLayers, mode: str, conv_bias: bool) -> None:
        super().__init__(conv_layers=conv_layers, mode=mode, conv_bias=conv_bias)
        self.shapes = conv_layers
        self.has_group_norm = mode == "default"

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Compute features [B, C, T] from samples [B, S] and lengths [B]."""
        blocks: list[Any] = list(self.conv_layers)  # nn.Sequential each, with the convolution first
        first, *others = blocks
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


def layer_norm(x: Tensor, block: Any) -> Tensor:
    """Apply the norm over the channels of a block in fairseq's `layer_norm` mode to x [B, T, C].

    fairseq copies x to fp32 and keeps the copy for the backward pass; autocast would do the same. The copy is not
    needed, because torch's kernels compute in fp32 internally for every precision of x.
    """
    norm = block[2][1]  # between two transpositions
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def normed_convolution(waveforms: Tensor, frames: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm) -> Tensor:
    """Convolve waveforms and apply a group norm to the result.

    Args:
        waveforms: [B, S], samples.
        frames: [B], the number of frames of each utterance, from which the norm takes its statistics.
        conv: the convolution, of one input channel and C output channels, without padding. A bias has no effect,
            because the norm subtracts it.
        norm: the affine group norm, with one channel in each group.

    Returns:
        [B, T, C].
    """
    frames = frames.to(waveforms.device, non_blocking=True)
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    # The norm would subtract any offset. It is subtracted first, because a quiet recording loses precision beside a
    # large offset.
    samples = (frames - 1) * stride + kernel
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < samples[:, None]
    waveforms = waveforms.float()
    windows = (waveforms - (waveforms * valid).sum(1, keepdim=True) / samples[:, None]).unfold(1, kernel, stride)
    kernels, bias = normed_kernels(windows, frames, conv.weight[:, 0], norm)
    dtype = autocast_dtype(waveforms, conv.weight.dtype)
    if waveforms.is_cuda:
        # The bias as the kernel of a constant sample: a bias of its own would be copied to the size of the result
        # first. With a multiple of 8 columns, products use the fast kernels.
        fill = (0, -(kernel + 1) % 8)
        windows = F.pad(F.pad(windows.to(dtype), (0, 1), value=1.0), fill)
        return windows @ F.pad(torch.cat([kernels, bias[:, :, None]], 2).to(dtype), fill).transpose(1, 2)
    return torch.baddbmm(bias[:, None].to(dtype), windows.to(dtype), kernels.transpose(1, 2).to(dtype))


def normed_kernels(windows: Tensor, frames: Tensor, weight: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """The kernels and biases, for each utterance, that convolve and normalise in one step.

    They are computed in float64. If a kernel passes a band with hardly any energy, its output's variance is a small
    difference of large numbers.

    Args:
        windows: [B, T, K], of the waveform, whose own mean is near 0.
        frames: [B], the number of windows of each utterance without its padding.
        weight: [C, K].
        norm: an affine group norm over C channels, one in each group.

    Returns:
        [B, C, K] and [B, C], float64.
    """
    valid = torch.arange(windows.size(1), device=windows.device) < frames[:, None]
    count, weight = frames[:, None, None], weight.double()
    windows = windows * valid[:, :, None].double()  # the only copy in float64
    mean = windows.sum(1, keepdim=True) / count
    covariance = windows.transpose(1, 2) @ windows / count - mean.transpose(1, 2) * mean
    variance = ((weight @ covariance) * weight).sum(2)
    kernels = weight * (norm.weight.double() * torch.rsqrt(variance + norm.eps))[:, :, None]
    return kernels, norm.bias.double() - (kernels * mean).sum(2)


def convolution(x: Tensor, conv: nn.Conv1d, after_gelu: bool = False) -> Tensor:
    """Convolve x [B, T, C], or GELU(x) with `after_gelu`, without padding: [B, T', C']."""
    dtype = autocast_dtype(x, conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return ChannelsLastConvolution.apply(x.to(dtype), conv.weight.to(dtype), bias, conv.stride[0], after_gelu)


class ChannelsLastConvolution(torch.autograd.Function):
    """A convolution of [B, T, C], optionally of its GELU.

    It keeps GELU's output for the backward pass only in half precision on a GPU.

    On a CPU, the gradient of the weight is a matrix product: oneDNN's takes up to six times as long in this layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, after_gelu: bool) -> Tensor:
        activated = F.gelu(x) if after_gelu else x
        keeps = x.is_cuda and x.dtype != torch.float32
        ctx.save_for_backward(x, weight, activated if keeps else None)
        ctx.stride, ctx.has_bias, ctx.after_gelu = stride, bias is not None, after_gelu
        return F.conv2d(as_image(activated), as_image_kernel(weight), bias, (1, stride)).squeeze(2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, activated = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias
        if gradient.is_cuda:
            if activated is None:
                activated = F.gelu(x) if ctx.after_gelu else x
            found = convolution_gradients(gradient, activated, weight, ctx.stride, wanted)
        else:
            found = (
                convolution_gradients(gradient, x, weight, ctx.stride, (True, False, False))[0] if wanted[0] else None,
                weight_gradient(gradient, x, weight.size(2), ctx.stride, ctx.after_gelu) if wanted[1] else None,
                gradient.sum((0, 1)) if wanted[2] else None,
            )
        x_gradient, kernel_gradient, bias_gradient = found
        if x_gradient is not None and ctx.after_gelu:
            torch.ops.aten.gelu_backward(x_gradient, x, grad_input=x_gradient)  # in place
        return x_gradient, kernel_gradient, bias_gradient, None, None


def weight_gradient(gradient: Tensor, x: Tensor, taps: int, stride: int, after_gelu: bool) -> Tensor:
    """The gradient of a convolution's weight, computed on a CPU, one utterance at a time to save memory.

    Args:
        gradient: [B, T', C'], of the convolution's output.
        x: [B, T, C], the convolution's input, before the GELU with `after_gelu`.
        taps: K, the kernel's width.
        stride: of the convolution.
        after_gelu: whether the convolution is one of GELU(x).

    Returns:
        [C', C, K].
    """
    gradients = []
    for output_gradient, features in zip(gradient, x):
        if after_gelu:
            features = F.gelu(features)
        frames = len(output_gradient)
        gradients.append(
            torch.stack([output_gradient.t() @ features[tap::stride][:frames] for tap in range(taps)], dim=2)
        )
    return torch.stack(gradients).sum(0)


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a convolution without padding, from one call of torch's.

    torch.nn.grad would ignore the layout of x and copy twice.

    Args:
        gradient: [B, T', C'], of its output.
        x: [B, T, C], its input.
        weight: [C', C, K].
        stride: of the convolution.
        wanted: whether to compute the gradients of x, weight and bias.

    Returns:
        [B, T, C], [C', C, K] and [C']; None for those that are not wanted.
    """
    to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
        as_image(gradient), as_image(x), as_image_kernel(weight), [len(weight)], (1, stride), (0, 0), (1, 1), False,
        (0, 0), 1, wanted,
    )  # fmt: skip
    return (
        to_x.squeeze(2).transpose(1, 2) if wanted[0] else None,
        to_weight.squeeze(2) if wanted[1] else None,
        to_bias if wanted[2] else None,
    )


def as_image(x: Tensor) -> Tensor:
    """View [B, T, C] as the image [B, C, 1, T] in torch's channels-last layout, without a copy."""
    return x.transpose(1, 2).unsqueeze(2)


def as_image_kernel(weight: Tensor) -> Tensor:
    """Convert the kernel [C', C, K] to a kernel [C', C, 1, K] for images, in the channels-last layout."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def autocast_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast computes matrix products of `x`, or `dtype` without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
