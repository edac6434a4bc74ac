"""Stops a training whose loss or gradient is not finite, and names the place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_stack.errors import TrainingStopped

LAST_CHECKPOINT = "the last checkpoint is from before"


def loss_stop(
    loss: float, targets: Mapping[Any, Tensor], utterances: Iterable[str], update: int, stage: int
) -> TrainingStopped:
    """Return the TrainingStopped for a loss that is not finite. It names the teacher's outputs that are not finite.

    Args:
        loss: of a batch, before fp16's loss scaling.
        targets: {teacher layer: [B, T, D]}.
        utterances: the ids of the utterances.
        update: the number of updates done.
        stage: the student's stage, counted from 1.
    """
    broken = [str(layer) for layer, target in targets.items() if not bool(torch.isfinite(target).all())]
    what = f"output of teacher layer {', '.join(broken)}" if broken else f"loss ({loss})"
    return TrainingStopped(f"{_where(what, update, stage, utterances)}; {LAST_CHECKPOINT}")


def loss_elsewhere_stop(update: int, stage: int) -> TrainingStopped:
    """Return the TrainingStopped for a loss that is not finite in another process, which names the utterances."""
    what = f"at update {update}, stage {stage}, the loss of another process is not finite"
    return TrainingStopped(f"{what}, and the log of that process names the utterances; {LAST_CHECKPOINT}")


def gradient_stop(norm: Tensor | float, utterances: Iterable[str], update: int, stage: int) -> TrainingStopped:
    """Return the TrainingStopped for a gradient whose norm is not finite although the loss is."""
    return TrainingStopped(
        f"{_where(f'gradient (norm {norm})', update, stage, utterances)}; lower optimization.lr or set"
        f" optimization.clip_norm; {LAST_CHECKPOINT}"
    )


def loss_scale_stop(problem: Exception, utterances: Iterable[str], update: int, stage: int) -> TrainingStopped:
    """Return the TrainingStopped for gradients that overflow at every loss scale of fp16."""
    return TrainingStopped(
        f"{_where('gradient in fp16 at every loss scale', update, stage, utterances)} ({problem}); lower"
        f" optimization.lr, set optimization.clip_norm or use common.bf16; {LAST_CHECKPOINT}"
    )


def _where(what: str, update: int, stage: int, utterances: Iterable[str]) -> str:
    names = ", ".join(dict.fromkeys(utterances))  # each once: AMP computes a batch again after an overflow
    return f"at update {update}, stage {stage}, the {what} is not finite on the utterances {names}"
