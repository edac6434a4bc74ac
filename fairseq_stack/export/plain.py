"""The student's forward pass in plain PyTorch: what exports are compared with, and what ONNX is made of.

Written from the architecture and not from fairseq's modules, so that it needs none of them; the tests hold it to the
training model. As there, an utterance gives the same features alone and in a padded batch.
"""

import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

EPSILON = 1e-5  # of every norm in the network

# Queries that attend at once. Four minutes of speech would otherwise need 0.6 GB for the weights of each head.
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
    """A student of fixed depth, in eval mode.

    Args:
        student: a Student.
    """

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.config = student.config
        self.activation = _ACTIVATIONS[self.config["activation_fn"]]
        self.attend = attend
        weights = dict(student.weights)
        # Weight norm: for each position in the kernel a length and a direction.
        length, direction = (weights.pop(f"encoder.pos_conv.0.weight_{part}") for part in "gv")
        weights["encoder.pos_conv.0.weight"] = direction * length / direction.norm(dim=(0, 1), keepdim=True)
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def parameters_of(self, module):
        """Weight and bias of a module by fairseq's name; None for what it does not have."""
        return [getattr(self, f"{module}.{part}".replace(".", "_"), None) for part in ("weight", "bias")]

    def linear(self, x, module):
        return F.linear(x, *self.parameters_of(module))

    def norm(self, x, module):
        weight, bias = self.parameters_of(module)
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)

    def forward(self, waveforms, lengths):
        """Hidden states as fairseq_stack.models counts them.

        Args:
            waveforms: [B, S], samples at 16 kHz, as recorded: where training normalised them, this does.
            lengths: [B], samples of each utterance; what lies behind is padding.

        Returns:
            depth + 1 times [B, T, D], and [B], the frames of each utterance.
        """
        if self.student.normalize:
            waveforms = normalize(waveforms, lengths, self.student.normalize_epsilon)
        x, frames = self.features(waveforms, lengths)
        x = x.transpose(1, 2)
        if "layer_norm.weight" in self.student.weights:
            x = self.norm(x, "layer_norm")
        if "post_extract_proj.weight" in self.student.weights:
            x = self.linear(x, "post_extract_proj")

        inside = mask(x.size(1), frames)
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

    def features(self, waveforms, lengths):
        """[B, S] samples and [B] lengths to the CNN's [B, C, T], and [B] frames."""
        x, frames = waveforms[:, None], lengths
        for index, (_, kernel, stride) in enumerate(self.student.conv_layers):
            block = f"feature_extractor.conv_layers.{index}"
            frames = (frames - kernel) // stride + 1
            if index == 0 and self.config["extractor_mode"] == "default":
                x = normed_convolution(
                    waveforms, frames, self.parameters_of(f"{block}.0")[0], stride, *self.parameters_of(f"{block}.2")
                )
            else:
                x = F.conv1d(x, *self.parameters_of(f"{block}.0"), stride=stride)
            if self.config["extractor_mode"] == "layer_norm":
                x = self.norm(x.transpose(1, 2), f"{block}.2.1").transpose(1, 2)
            x = F.gelu(x)
        return x, frames

    def attention(self, x, inside, module):
        heads = self.config["encoder_attention_heads"]
        query, key, value = (
            self.linear(x, f"{module}.{part}_proj").unflatten(2, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        mixed = self.attend(query, key, value, inside[:, None, None], _QUERIES)
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{module}.out_proj")

    def feed_forward(self, x, layer):
        return self.linear(self.activation(self.linear(x, f"{layer}.fc1")), f"{layer}.fc2")

    def outputs(self, waveforms, lengths):
        """Hidden states by number, and what heads on the last one predict as `head {teacher layer}`."""
        states, _ = self(waveforms, lengths)
        heads = {f"head {layer}": predict(self.student, layer, states[-1]) for layer in heads_on_top(self.student)}
        return {**dict(enumerate(states)), **heads}


def normalize(waveforms, lengths, epsilon):
    """[B, S] to zero mean and unit variance over the first `lengths` [B] samples, zeros behind them.

    In float64: onnxruntime adds up one by one, and over a minute of fp32 that costs three digits.
    """
    inside, count = mask(waveforms.size(1), lengths), lengths[:, None]
    wide = waveforms.double()
    centred = (wide - (wide * inside).sum(1, keepdim=True) / count) * inside
    return (centred / torch.sqrt(centred.pow(2).sum(1, keepdim=True) / count + epsilon)).float()


def normed_convolution(waveforms, frames, weight, stride, scale, shift):
    """The first convolution and its group norm, with one channel to the group, over an utterance's own frames.

    The mean and the covariance of the waveform's windows, in float64, give those of every channel. A bias of the
    convolution would have no effect.

    Args:
        waveforms: [B, S].
        frames: [B], the frames that count.
        weight: [C, 1, K], the convolution's; `stride` is its stride.
        scale, shift: [C], the norm's.

    Returns:
        [B, C, T].
    """
    size, kernel = waveforms.size(1), weight.size(2)
    windows = torch.stack([waveforms[:, tap : size - kernel + tap + 1 : stride] for tap in range(kernel)], 1).double()
    inside, count = mask(windows.size(2), frames)[:, None], frames[:, None, None]
    centred = windows - (windows * inside).sum(2, keepdim=True) / count  # [B, K, T]
    within = centred * inside
    # No product with a transposition: onnxruntime up to 1.23 joins the two, and has no such product in float64.
    covariance = torch.einsum("bit,bjt->bij", within, within) / count
    taps = weight[:, 0].double()
    variance = ((taps @ covariance) * taps).sum(2)  # [B, C]
    kernels = taps * (scale / torch.sqrt(variance + EPSILON))[:, :, None]
    return kernels.float() @ centred.float() + shift[:, None]


def attend(query, key, value, inside, queries: int):
    """Attention [B, H, T, D] to the frames `inside` [B, 1, 1, T], for `queries` frames at a time.

    Scripted, the loop becomes one of ONNX.
    """
    blocks = []
    for start in range(0, inside.size(3), queries):
        block = query[:, :, start : start + queries]
        blocks.append(F.scaled_dot_product_attention(block, key, value, attn_mask=inside))
    return torch.cat(blocks, dim=2)


def mask(size, lengths):
    """[..., size] bool, true for the first `lengths` [...] entries."""
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def predict(student, layer, x):
    """What the head of a teacher layer makes of a hidden state: [B, T, D] to [B, T, teacher width]."""
    for index, (weight, bias) in enumerate(head_tensors(student, layer)):
        x = F.linear(F.gelu(x) if index else x, weight, bias)
    return x


def head_tensors(student, layer):
    """Weight and bias of each linear map of a head: one, or two with a GELU between them."""
    weights = sorted(name for name in student.heads if re.fullmatch(rf"heads\.{layer}\.(\d+\.)?weight", name))
    return [(student.heads[name], student.heads[name.removesuffix("weight") + "bias"]) for name in weights]


def heads_on_top(student):
    """The teacher layers that heads on the last hidden state predict, ascending."""
    layers = sorted({int(name.split(".")[1]) for name in student.heads})
    if student.config["intermediate_style"] == "prediction":
        return layers
    # Layer to layer, the last one learns the teacher's last, if the student learns that at all.
    return layers[-1:] if student.config["output_weight"] else []
