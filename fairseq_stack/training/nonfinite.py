"""Stop a training whose numbers have left the range of floating point, and say where that was."""

import torch

from fairseq_stack.errors import TrainingStopped


def check_loss(loss, targets, utterances, update, stage):
    """Check the loss of a batch; the teacher is looked at only where the loss is not finite.

    Args:
        loss: a scalar, before fp16's loss scaling.
        targets: {teacher layer: [B, T, D]}.
        utterances: the ids of the batch's utterances.
        update: updates done.
        stage: of the student, counted from 1.

    Raises:
        TrainingStopped: the loss is not finite.
    """
    if torch.isfinite(loss):
        return
    broken = [str(layer) for layer, target in targets.items() if not bool(torch.isfinite(target).all())]
    what = f"output of teacher layer {', '.join(broken)}" if broken else f"loss ({loss.item()})"
    raise TrainingStopped(f"{_where(what, update, stage, utterances)}; {LAST_CHECKPOINT}")


def gradient_stop(norm, utterances, update, stage):
    """The TrainingStopped for a gradient whose norm is not finite while the loss was."""
    return TrainingStopped(
        f"{_where(f'gradient (norm {norm})', update, stage, utterances)}; lower optimization.lr or set"
        f" optimization.clip_norm; {LAST_CHECKPOINT}"
    )


def loss_scale_stop(problem, utterances, update, stage):
    """The TrainingStopped for gradients that overflow at every loss scale that fp16 may use."""
    return TrainingStopped(
        f"{_where('gradient in fp16 at every loss scale', update, stage, utterances)} ({problem}); lower"
        f" optimization.lr, set optimization.clip_norm or use common.bf16; {LAST_CHECKPOINT}"
    )


LAST_CHECKPOINT = "the last checkpoint is from before"


def _where(what, update, stage, utterances):
    utterances = dict.fromkeys(utterances)  # each once: AMP computes a batch again after an overflow
    return f"at update {update}, stage {stage}, the {what} is not finite on the utterances {', '.join(utterances)}"
