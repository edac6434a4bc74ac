"""Which teacher layers the student learns, and which of its hidden states learns each of them.

The model builds its heads and the criterion its terms with these functions, both from the criterion's fields.
"""

import math
from typing import Any

from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.errors import InputError, check_choice, check_numbers, check_weight

STYLES = ("layer_to_layer", "prediction")


def check_supervision(cfg: Any) -> None:
    """Check names and combinations of the fields that model and criterion share.

    Args:
        cfg: has the fields loss, intermediate_style, teacher_layers and output_weight.

    Raises:
        InputError: the layers are not a list, a name is unknown, nothing is learned, or loss and style cannot
            be combined.
    """
    check_numbers("criterion.teacher_layers", cfg.teacher_layers)
    loss = LOSSES.choose(cfg.loss)
    check_choice("criterion.intermediate_style", cfg.intermediate_style, STYLES)
    check_weight("criterion.output_weight", cfg.output_weight)
    if not cfg.output_weight and not cfg.teacher_layers:
        raise InputError(
            "criterion.output_weight=0 with empty criterion.teacher_layers leaves nothing to learn; name layers"
        )
    if not loss.heads and cfg.intermediate_style == "prediction":
        raise InputError(
            f"criterion.loss={cfg.loss} compares layers directly and has no heads, but"
            " criterion.intermediate_style=prediction needs heads; choose layer_to_layer"
        )


def taught_layers(cfg: Any, teacher_depth: int) -> list[int]:
    """The teacher layers that the student learns, ascending. The last one is among them if output_weight is not 0."""
    return sorted({*cfg.teacher_layers, *([teacher_depth] if cfg.output_weight else [])})


def predicted_layers(cfg: Any, teacher_depth: int) -> list[int]:
    """The teacher layers that the student predicts with heads: all that it learns, or none if the loss has no heads."""
    return taught_layers(cfg, teacher_depth) if LOSSES.choose(cfg.loss).heads else []


def head_width(cfg: Any, task: Any) -> int:
    """The outputs of a head: the teacher's features, or a logit for each entry of each codebook."""
    return math.prod(task.codebook_shape) if LOSSES[cfg.loss].codes else task.teacher.width


def check_mask(cfg: Any) -> None:
    """Raise an InputError if frames are masked and the loss cannot separate masked and unmasked frames."""
    if cfg.mask_prob > 0 and LOSSES.choose(cfg.loss).whole_utterances:
        raise InputError(
            f"criterion.loss={cfg.loss} relates all frames to each other, but task.mask_prob={cfg.mask_prob} needs"
            " separate losses of masked and unmasked frames; set task.mask_prob=0"
        )


def student_position(teacher_layer: int, teacher_depth: int, student_depth: int, style: str = "layer_to_layer") -> int:
    """The index of the student's hidden state that learns a teacher layer.

    With `layer_to_layer` it is the one at the same relative depth. At stage b of interleaved stacking, block i
    ends at position i * b, which learns from teacher layer i * teacher_depth / K in every stage. (The paper does
    not say which copy in a block learns it. Only the last copy has exactly the same relative depth.) With
    `prediction` it is the last hidden state, as in DistilHuBERT.

    Args:
        teacher_layer: counted from 1.
        teacher_depth: number of transformer layers of the teacher.
        student_depth: number of layers in use of the student.
        style: one of STYLES.

    Raises:
        InputError: no student layer is at that relative depth.
    """
    if style == "prediction":
        return student_depth
    position, remainder = divmod(teacher_layer * student_depth, teacher_depth)
    if remainder:
        raise InputError(
            f"criterion.teacher_layers: teacher layer {teacher_layer} of {teacher_depth} has no student layer"
            f" at the same relative depth when the student is {student_depth} layers deep; choose multiples of"
            f" {_least_layer(teacher_depth, student_depth)}"
        )
    return position


def _least_layer(teacher_depth: int, student_depth: int) -> int:
    return next(layer for layer in range(1, teacher_depth + 1) if layer * student_depth % teacher_depth == 0)
