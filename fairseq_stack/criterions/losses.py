"""Losses between the student's output and the teacher's hidden states, over valid frames only.

Shapes: B utterances, T frames, D features. Every loss is a sum over frames. So the sums of several
batches, devices or accumulated micro-batches can be added; the caller divides by the number of frames.
The arithmetic is in fp32 for inputs of any precision, under autocast too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_stack.registry import Registry

TARGET_NORMALIZATIONS = ("none", "layer_norm", "instance_norm")


def valid_frames(frames: Tensor, length: int) -> Tensor:
    """A mask [B, T], true on frames and false on padding, from frame counts [B] and T = `length`."""
    return torch.arange(length, device=frames.device) < frames[:, None]


@dataclass(frozen=True)
class Loss:
    """A loss and its requirements.

    Attributes:
        function: returns a sum over valid frames, in fp32. With `heads` its arguments are (prediction, target, valid),
            [B, T, D] each and [B, T] bool. Without, they are (student_input, student_output, teacher_input,
            teacher_output, valid), the hidden states before and after a layer.
        heads: whether the student predicts the teacher's hidden states with heads.
        whole_utterances: whether the loss relates frames to each other. Then masked and unmasked frames cannot have
            separate losses.
        fields: names of the criterion's fields that `function` takes as keywords.
        codes: the kind of task.target_format, `units` or `pq`, whose codes the student predicts in place of hidden
            states; empty for none. Then the prediction is [B, T, codebooks * entries] and the target
            [B, T, codebooks].
    """

    function: Callable[..., Tensor]
    heads: bool = True
    whole_utterances: bool = False
    fields: tuple[str, ...] = ()
    codes: str = ""


LOSSES = Registry("criterion.loss", entry=Loss)


@LOSSES.register("mse")
def mse(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error, averaged over features and summed over valid frames.

    Args:
        prediction, target: [B, T, D].
        valid: [B, T] bool.
    """
    return _difference(prediction, target, valid).pow(2).mean(-1).sum()


@LOSSES.register("l1")
def l1(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Absolute error, averaged over features and summed over valid frames; arguments as for `mse`."""
    return _difference(prediction, target, valid).abs().mean(-1).sum()


@LOSSES.register("l1_cosine", fields=("cosine_weight",))
def l1_cosine(prediction: Tensor, target: Tensor, valid: Tensor, cosine_weight: float = 1.0) -> Tensor:
    """Absolute error plus `cosine_weight` * -log sigmoid(cosine similarity), summed over valid frames.

    Chang et al., "DistilHuBERT", ICASSP 2022.

    Args:
        prediction, target: [B, T, D].
        valid: [B, T] bool.
        cosine_weight: lambda in the paper, which uses 1.
    """
    prediction, target = _without_padding(prediction, valid), _without_padding(target, valid)
    similarity = F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    return (prediction - target).abs().mean(-1).sum() - cosine_weight * (similarity * valid).sum()


def _difference(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """prediction - target in fp32, zero in padding."""
    return (prediction.float() - target).masked_fill_(~valid[:, :, None], 0.0)


def _without_padding(states: Tensor, valid: Tensor) -> Tensor:
    """States [B, T, D] in fp32, with zeros in padding.

    Not even NaN in padding reaches a value or a gradient. states[valid] would make the CPU wait for a GPU, because the
    size of its result depends on the mask.
    """
    return states.float().masked_fill(~valid[:, :, None], 0.0)


@LOSSES.register("temporal_gram", heads=False, whole_utterances=True)
def temporal_gram(
    student_input: Tensor, student_output: Tensor, teacher_input: Tensor, teacher_output: Tensor, valid: Tensor
) -> Tensor:
    """Squared error between temporal Gram matrices, the layer-wise one plus the intra-layer one.

    Jang et al., "STaR: Distilling Speech Temporal Relation for Lightweight Speech Self-Supervised
    Learning Models", ICASSP 2024. The layer-wise matrix holds the inner products of a layer's output
    frames with each other. The intra-layer matrix holds the inner products of its input frames with its
    output frames. Both are [T, T] for every width, so no projection is needed. The paper adds both with
    equal weight.

    Two choices are ours. Inner products are divided by the width, which makes a narrow student comparable to
    its teacher. An utterance of T frames counts T times the mean over its T * T entries, so a frame has the
    same weight in every batch.

    Args:
        student_input, student_output: [B, T, D], the hidden states before and after a layer.
        teacher_input, teacher_output: [B, T, E], the same for the teacher.
        valid: [B, T] bool.
    """
    # Autocast would run the matrix products in half precision.
    with torch.autocast(valid.device.type, enabled=False):
        student_input, student_output, teacher_input, teacher_output = (
            _without_padding(states, valid) for states in (student_input, student_output, teacher_input, teacher_output)
        )
        layer_wise = _gram(student_output, student_output) - _gram(teacher_output, teacher_output)
        intra_layer = _gram(student_input, student_output) - _gram(teacher_input, teacher_output)
        errors = (layer_wise.pow(2) + intra_layer.pow(2)).sum((1, 2))
        return (errors / valid.sum(1).clamp(min=1)).sum()


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the frames of two [B, T, D], averaged over features: [B, T, T]."""
    return x @ y.transpose(1, 2) / x.size(2)


@LOSSES.register("codes", codes="pq")
@LOSSES.register("units", codes="units")
def cross_entropy(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of the teacher's codes, averaged over codebooks and summed over valid frames.

    With one codebook, whose codes are clusters of k-means, it is the loss of HuBERT (Hsu et al., TASLP 2021) and
    DiceHuBERT (Chi et al., Interspeech 2025). With several it is that of Guo et al., "Predicting Multi-Codebook Vector
    Quantization Indexes for Knowledge Distillation", ICASSP 2023.

    Args:
        prediction: [B, T, codebooks * entries], logits.
        target: [B, T, codebooks], integers.
        valid: [B, T] bool.
    """
    logits = _without_padding(prediction, valid).view(-1, prediction.size(2) // target.size(2))
    errors = F.cross_entropy(logits, target.flatten().long(), reduction="none")
    return (errors.view(target.shape).mean(2) * valid).sum()


def predicted_right(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The share of a frame's codes that are the most probable ones, summed over valid frames.

    The arguments are those of `cross_entropy`.
    """
    guess = prediction.unflatten(2, (target.size(2), -1)).argmax(3)
    return ((guess == target).mean(2, dtype=torch.float32) * valid).sum()


def normalize_targets(target: Tensor, valid: Tensor, how: str) -> Tensor:
    """Normalise targets to zero mean and unit variance, without a learned scale.

    Args:
        target: [B, T, D].
        valid: [B, T] bool.
        how: `none`; `layer_norm`, over the features of each frame; or `instance_norm`, over the valid
            frames of each utterance and feature. data2vec (Baevski et al. 2022) uses both.

    Returns:
        [B, T, D], in fp32 unless `how` is `none`.
    """
    if how == "none":
        return target
    target = target.float()
    if how == "layer_norm":
        return F.layer_norm(target, target.shape[-1:])
    padding, count = ~valid[:, :, None], valid.sum(1).clamp(min=1)[:, None, None]
    mean = target.masked_fill(padding, 0.0).sum(1, keepdim=True) / count
    centred = target - mean
    variance = centred.masked_fill(padding, 0.0).pow(2).sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)


def fields_of(name: str) -> tuple[str, ...]:
    """The criterion's fields that a loss takes. For an unknown name, the fields that any loss takes."""
    losses = [LOSSES[name]] if name in LOSSES else LOSSES.values()
    return tuple(dict.fromkeys(field for loss in losses for field in loss.fields))
