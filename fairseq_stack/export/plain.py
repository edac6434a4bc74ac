"""The student's forward pass in plain PyTorch: the ONNX file is made of it, and exports can be compared with it.

It is written from the architecture and needs none of fairseq's modules. The tests compare it with the training model.
As there, an utterance gives the same features alone and in a padded batch.
"""

import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fairseq_stack.checkpoints.student import Output, Student

EPSILON = 1e-5  # of every norm in the network

# Queries that attend at once. All queries of four minutes of speech would need 0.6 GB for the weights of each head.
_QUERIES = 512

_TANH_GELU = partial(F.gelu, approximate="tanh")
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class PlainStudent(nn.Module):
    """A student of fixed depth, in eval mode. After `.half()` it computes in fp16, except for the first
    convolution and the weighted sums of attention.

    Args:
        student: a Student.
    """

    def __init__(self, student: Student):
        super().__init__()
        self.student = student
        self.config = student.config
        self.activation = _ACTIVATIONS[self.config["activation_fn"]]
        self.attend = attend
        weights = dict(student.weights)
        # Weight norm: each position in the kernel has a length and a direction.
        length, direction = (weights.pop(f"encoder.pos_conv.0.weight_{part}") for part in "gv")
        weights["encoder.pos_conv.0.weight"] = direction * length / direction.norm(dim=(0, 1), keepdim=True)
        for number, (weight, bias) in enumerate(student.output.maps if student.output else ()):
            weights.update({f"output.{number}.weight": weight, f"output.{number}.bias": bias})
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def parameters_of(self, module: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a module by fairseq's name; the bias is None if the module has none."""
        name = module.replace(".", "_")
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias", None)

    def linear(self, x: Tensor, module: str) -> Tensor:
        return F.linear(x, *self.parameters_of(module))

    def norm(self, x: Tensor, module: str) -> Tensor:
        weight, bias = self.parameters_of(module)
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """The hidden states, numbered as in fairseq_stack.models.

        Args:
            waveforms: [B, S], samples at 16 kHz, as recorded. They are normalised here if the training normalised.
            lengths: [B], samples of each utterance; the rest is padding.

        Returns:
            depth + 1 times [B, T, D], and [B], the frames of each utterance.
        """
        if self.student.normalize:
            waveforms = normalize_in_float64(waveforms, lengths, self.student.normalize_epsilon)
        x, frames = self.features(waveforms, lengths)
        x = x.transpose(1, 2)
        if "layer_norm.weight" in self.student.weights:
            x = self.norm(x, "layer_norm")
        if "post_extract_proj.weight" in self.student.weights:
            x = self.linear(x, "post_extract_proj")

        inside = valid_mask(x.size(1), frames)
        kernel = self.config["conv_pos"]
        positions = F.conv1d(
            (x * inside[:, :, None]).transpose(1, 2),
            *self.parameters_of("encoder.pos_conv.0"),
            padding=kernel // 2,
            groups=self.config["conv_pos_groups"],
        )
        if kernel % 2 == 0:
            positions = positions[:, :, :-1]
        x = x + F.gelu(positions).transpose(1, 2)

        pre_norm = self.config["layer_norm_first"]
        if not pre_norm:
            x = self.norm(x, "encoder.layer_norm")
        states = [x]
        for index in range(self.student.depth):
            layer = f"encoder.layers.{index}"
            norms = f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"
            if pre_norm:
                x = x + self.attention(self.norm(x, norms[0]), inside, f"{layer}.self_attn")
                x = x + self.feed_forward(self.norm(x, norms[1]), layer)
            else:
                x = self.norm(x + self.attention(x, inside, f"{layer}.self_attn"), norms[0])
                x = self.norm(x + self.feed_forward(x, layer), norms[1])
            states.append(x)
        if pre_norm:
            states[-1] = self.norm(x, "encoder.layer_norm")
        return states, frames

    def features(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The features [B, C, T] of the CNN, and the frames [B], of samples [B, S] and lengths [B]."""
        x, frames = waveforms[:, None], lengths
        for index, (_, kernel, stride) in enumerate(self.student.conv_layers):
            block = f"feature_extractor.conv_layers.{index}"
            frames = (frames - kernel) // stride + 1
            weight, bias = self.parameters_of(f"{block}.0")
            if index > 0:
                x = F.conv1d(x, weight, bias, stride=stride)
            else:
                # Always in fp32, because fp16 has too few digits for a quiet recording with an offset.
                if self.config["extractor_mode"] == "default":
                    norm = self.parameters_of(f"{block}.2")
                    x = convolution_and_group_norm(waveforms, frames, weight.float(), stride, *norm)
                else:
                    x = F.conv1d(x, weight.float(), None if bias is None else bias.float(), stride=stride)
                x = x.to(weight.dtype)
            if self.config["extractor_mode"] == "layer_norm":
                x = self.norm(x.transpose(1, 2), f"{block}.2.1").transpose(1, 2)
            x = F.gelu(x)
        return x, frames

    def attention(self, x: Tensor, inside: Tensor, module: str) -> Tensor:
        heads = self.config["encoder_attention_heads"]
        query, key, value = (
            self.linear(x, f"{module}.{part}_proj").float().unflatten(2, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        mixed = self.attend(query, key, value, inside[:, None, None], _QUERIES)
        return self.linear(mixed.transpose(1, 2).flatten(2).to(x.dtype), f"{module}.out_proj")

    def feed_forward(self, x: Tensor, layer: str) -> Tensor:
        return self.linear(self.activation(self.linear(x, f"{layer}.fc1")), f"{layer}.fc2")

    def logits(self, output: Output, x: Tensor, frames: Tensor) -> Tensor:
        """The logits [B, T, outputs], or pooled [B, outputs], of a last hidden state x [B, T, D] and frames [B]."""
        for number in range(len(output.maps)):
            x = self.linear(x, f"output.{number}")
            if output.pooled and number == 0:
                inside = valid_mask(x.size(1), frames)[:, :, None]
                x = ((x * inside).float().sum(1) / frames[:, None]).to(x.dtype)
        return x

    def outputs(self, waveforms: Tensor, lengths: Tensor) -> dict[int | str, Tensor]:
        """Hidden states by number, and predictions of the heads on the last one by `head {teacher layer}`.

        Of a fine-tuned student only the logits, [B, T, outputs]; T is 1 if they are pooled.
        """
        states, frames = self(waveforms, lengths)
        if output := self.student.output:
            logits = self.logits(output, states[-1], frames)
            return {"logits": logits[:, None] if output.pooled else logits}
        heads = {
            f"head {layer}": head_prediction(self.student, layer, states[-1]) for layer in heads_on_top(self.student)
        }
        return {**dict(enumerate(states)), **heads}


def normalize_in_float64(waveforms: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    """Waveforms [B, S] with zero mean and unit variance over the first `lengths` [B] samples, zeros after them.

    onnxruntime adds up samples one by one. Over a minute of fp32 that would cost three digits.
    """
    inside, count = valid_mask(waveforms.size(1), lengths), lengths[:, None]
    wide = waveforms.double()
    centred = (wide - (wide * inside).sum(1, keepdim=True) / count) * inside
    return (centred / torch.sqrt(centred.pow(2).sum(1, keepdim=True) / count + epsilon)).float()


def convolution_and_group_norm(
    waveforms: Tensor, frames: Tensor, weight: Tensor, stride: int, scale: Tensor, shift: Tensor | None
) -> Tensor:
    """The first convolution and its group norm, with one channel to the group, over an utterance's own frames.

    The mean and variance of each channel follow from the mean and covariance of the waveform's windows, in float64.
    The norm would remove a bias of the convolution.

    Args:
        waveforms: [B, S].
        frames: [B], the valid frames.
        weight: [C, 1, K], the kernels of the convolution.
        stride: the stride of the convolution.
        scale, shift: [C], weight and bias of the norm.

    Returns:
        [B, C, T].
    """
    size, kernel = waveforms.size(1), weight.size(2)
    windows = torch.stack([waveforms[:, tap : size - kernel + tap + 1 : stride] for tap in range(kernel)], 1).double()
    inside, count = valid_mask(windows.size(2), frames)[:, None], frames[:, None, None]
    centred = windows - (windows * inside).sum(2, keepdim=True) / count  # [B, K, T]
    within = centred * inside
    # An einsum, because onnxruntime up to 1.23 fuses a product with a transposition and cannot run that in float64.
    covariance = torch.einsum("bit,bjt->bij", within, within) / count
    taps = weight[:, 0].double()
    variance = ((taps @ covariance) * taps).sum(2)  # [B, C]
    kernels = taps * (scale / torch.sqrt(variance + EPSILON))[:, :, None]
    output = kernels.float() @ centred.float()
    return output if shift is None else output + shift[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, inside: Tensor, queries: int) -> Tensor:
    """Attention [B, H, T, D] to the frames `inside` [B, 1, 1, T], for `queries` frames at a time.

    When the function is scripted, the loop becomes a loop in ONNX.
    """
    blocks = []
    for start in range(0, inside.size(3), queries):
        block = query[:, :, start : start + queries]
        blocks.append(F.scaled_dot_product_attention(block, key, value, attn_mask=inside))
    return torch.cat(blocks, dim=2)


def valid_mask(size: int, lengths: Tensor) -> Tensor:
    """[..., size] bool, true for the first `lengths` [...] entries."""
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def head_prediction(student: Student, layer: int, x: Tensor) -> Tensor:
    """The prediction [B, T, teacher width] of a teacher layer's head for a hidden state [B, T, D]."""
    for index, (weight, bias) in enumerate(head_tensors(student, layer)):
        x = F.linear(F.gelu(x) if index else x, weight, bias)
    return x


def head_tensors(student: Student, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each linear map of a head. A head has one, or two with a GELU between them."""
    weights = sorted(name for name in student.heads if re.fullmatch(rf"heads\.{layer}\.(\d+\.)?weight", name))
    return [(student.heads[name], student.heads[name.removesuffix("weight") + "bias"]) for name in weights]


def heads_on_top(student: Student) -> list[int]:
    """The teacher layers that heads on the last hidden state predict, in ascending order."""
    layers = sorted({int(name.split(".")[1]) for name in student.heads})
    if student.config["intermediate_style"] == "prediction":
        return layers
    # In the layer-to-layer style, the last hidden state has a head only if the student learns the teacher's output.
    return layers[-1:] if student.config["output_weight"] else []
