"""Which teacher layers the student learns, and from which of its hidden states.

The model builds its heads by this and the criterion its terms, both from the criterion's fields.
"""

from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.errors import InputError, check_choice, check_numbers, check_weight

STYLES = ("layer_to_layer", "prediction")


def check_supervision(cfg):
    """Check names and combinations of the fields that model and criterion share.

    Args:
        cfg: has loss, intermediate_style, teacher_layers and output_weight.

    Raises:
        InputError: the layers are no list, a name is unknown, nothing is learned, or loss and style do
            not go together.
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
            f"criterion.loss={cfg.loss} compares layers with layers and has no heads, which"
            " criterion.intermediate_style=prediction asks for; choose layer_to_layer"
        )


def taught_layers(cfg, teacher_depth):
    """The teacher layers that the student learns, ascending; the last one if it is named or has a weight."""
    return sorted({*cfg.teacher_layers, *([teacher_depth] if cfg.output_weight else [])})


def predicted_layers(cfg, teacher_depth):
    """The teacher layers that the student predicts by heads: those that it learns, or none if the loss has no heads."""
    return taught_layers(cfg, teacher_depth) if LOSSES.choose(cfg.loss).heads else []


def check_mask(cfg):
    """Raise an InputError where frames are masked and the loss has no terms of masked and unmasked frames apart."""
    if cfg.mask_prob > 0 and LOSSES.choose(cfg.loss).whole_utterances:
        raise InputError(
            f"criterion.loss={cfg.loss} relates all frames, and task.mask_prob={cfg.mask_prob} asks for a"
            " loss on masked and unmasked frames apart; set task.mask_prob=0"
        )


def student_position(teacher_layer, teacher_depth, student_depth, style="layer_to_layer"):
    """The hidden state of the student that learns a teacher layer.

    With `layer_to_layer` it is the one at the same relative depth. At stage b of interleaved stacking
    block i ends at position i * b, which learns from teacher layer i * teacher_depth / K in every stage
    (the paper does not say which copy of a block is supervised; the last one keeps the relative depth
    exact). With `prediction` it is the last one, as in DistilHuBERT.

    Raises:
        InputError: no student layer lies at that depth.
    """
    if style == "prediction":
        return student_depth
    position, rest = divmod(teacher_layer * student_depth, teacher_depth)
    if rest:
        raise InputError(
            f"criterion.teacher_layers: teacher layer {teacher_layer} of {teacher_depth} has no student layer"
            f" at the same relative depth when the student is {student_depth} layers deep; choose multiples of"
            f" {_least_layer(teacher_depth, student_depth)}"
        )
    return position


def _least_layer(teacher_depth, student_depth):
    return next(layer for layer in range(1, teacher_depth + 1) if layer * student_depth % teacher_depth == 0)
