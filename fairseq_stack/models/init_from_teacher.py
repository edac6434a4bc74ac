"""Initialises a student's weights from its teacher."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fairseq_stack.errors import InputError
from fairseq_stack.models.hubert_encoder import HubertEncoder


def start_cnn(student: HubertEncoder, teacher: Any) -> None:
    """Copy the teacher's CNN to a student.

    The layer norm after the CNN is copied if the student has one, and the projection if its shape is the same.

    Args:
        student: a HubertEncoder, changed in place.
        teacher: a Teacher.

    Raises:
        InputError: the teacher is not a HubertEncoder, or its CNN has another shape.
    """
    field = "model.init_cnn_from_teacher=true"
    source = _encoder(teacher, field)
    _copy(source.feature_extractor, student.feature_extractor, "feature_extractor", field, teacher)
    if student.layer_norm.state_dict():  # empty if the student has no norm there
        _copy(source.layer_norm, student.layer_norm, "layer_norm", field, teacher)
    ours, theirs = student.post_extract_proj, source.post_extract_proj
    if ours is not None and theirs is not None and ours.weight.shape == theirs.weight.shape:
        _copy(theirs, ours, "post_extract_proj", field, teacher)


def start_layers(student: HubertEncoder, seats: Sequence[int], teacher: Any, layers: Sequence[int]) -> None:
    """Copy some of the teacher's transformer layers, its positional convolution and its encoder's layer norm.

    DistilHuBERT (Chang et al. 2021) initialises its two layers from the teacher's first two.

    Args:
        student: a HubertEncoder, changed in place.
        seats: the student's layers in use, in the order of the forward pass.
        teacher: a Teacher.
        layers: of the teacher, counted from 1; one for each seat.

    Raises:
        InputError: the teacher is not a HubertEncoder or has no such layer, or the numbers or the shapes of the
            layers differ.
    """
    field = f"model.init_layers_from_teacher={list(layers)}"
    source = _encoder(teacher, field)
    pre_norm = source.encoder.layer_norm_first
    if student.encoder.layer_norm_first != pre_norm:
        raise InputError(f"{field} needs model.layer_norm_first={str(pre_norm).lower()}, as the teacher has it")
    unknown = [layer for layer in layers if not 1 <= layer <= teacher.depth]
    if unknown:
        raise InputError(
            f"{field}: {unknown[0]} is no layer of task.teacher={teacher.name}; choose from 1 to {teacher.depth}"
        )
    if len(layers) != len(seats):
        raise InputError(
            f"{field} names {len(layers)} layers, but the student starts with {len(seats)}; name {len(seats)}"
        )
    pairs = {"pos_conv": source.encoder.pos_conv, "layer_norm": source.encoder.layer_norm}
    pairs.update({f"layers.{seat}": source.encoder.layers[layer - 1] for seat, layer in zip(seats, layers)})
    for name, module in pairs.items():
        _copy(module, student.encoder.get_submodule(name), f"encoder.{name}", field, teacher)


def _encoder(teacher: Any, field: str) -> HubertEncoder:
    if not isinstance(teacher.model, HubertEncoder):
        raise InputError(
            f"{field} needs a teacher from a checkpoint of fairseq, which task.teacher={teacher.name} is not"
        )
    return teacher.model


def _copy(source: nn.Module, target: nn.Module, name: str, field: str, teacher: Any) -> None:
    theirs, ours = source.state_dict(), target.state_dict()
    for key in sorted(theirs.keys() | ours.keys()):
        shapes = [tuple(weights[key].shape) if key in weights else "missing" for weights in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{field}: {name}.{key} is {shapes[0]} in the student and {shapes[1]} in"
                f" task.teacher={teacher.name}; give the student the teacher's shape there"
            )
    target.load_state_dict(theirs)
