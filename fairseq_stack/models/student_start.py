"""A student's first weights, taken from its teacher."""

from fairseq_stack.errors import InputError
from fairseq_stack.models.hubert_encoder import HubertEncoder


def start_cnn(student, teacher):
    """Copy the teacher's CNN and the layer norm behind it; the projection too if the widths agree.

    Args:
        student: a HubertEncoder, changed in place.
        teacher: a Teacher.

    Raises:
        InputError: the teacher has no encoder of this kind, or a CNN of another shape.
    """
    source = _encoder(teacher, "model.init_cnn_from_teacher=true")
    for name in ("feature_extractor", "layer_norm"):
        _copy(getattr(source, name), getattr(student, name), name, "model.init_cnn_from_teacher=true", teacher)
    ours, theirs = student.post_extract_proj, source.post_extract_proj
    if ours is not None and theirs is not None and ours.weight.shape == theirs.weight.shape:
        _copy(theirs, ours, "post_extract_proj", "model.init_cnn_from_teacher=true", teacher)


def start_layers(student, seats, teacher, layers):
    """Copy transformer layers, and with them the positional convolution and the encoder's layer norm.

    DistilHuBERT (Chang et al. 2021) starts its two layers from the teacher's first two.

    Args:
        student: a HubertEncoder, changed in place.
        seats: the student's layers in use, in the order of the forward pass.
        teacher: a Teacher.
        layers: as many layers of the teacher, counted from 1.

    Raises:
        InputError: the teacher has no encoder of this kind or no such layer, the numbers of layers
            differ, or the shapes do.
    """
    field = f"model.init_layers_from_teacher={list(layers)}"
    source = _encoder(teacher, field)
    unknown = [layer for layer in layers if not 1 <= layer <= teacher.depth]
    if unknown:
        raise InputError(
            f"{field}: {unknown[0]} is no layer of task.teacher={teacher.name}; choose from 1 to {teacher.depth}"
        )
    if len(layers) != len(seats):
        raise InputError(
            f"{field} names {len(layers)} layers, but the student starts with {len(seats)}; name {len(seats)}"
        )
    for name in ("pos_conv", "layer_norm"):
        _copy(getattr(source.encoder, name), getattr(student.encoder, name), f"encoder.{name}", field, teacher)
    for seat, layer in zip(seats, layers):
        name = f"encoder.layers.{seat}"
        _copy(source.encoder.layers[layer - 1], student.encoder.layers[seat], name, field, teacher)
    if source.encoder.layer_norm_first != student.encoder.layer_norm_first:
        raise InputError(
            f"{field}, but model.layer_norm_first={str(student.encoder.layer_norm_first).lower()} is not that of"
            f" task.teacher={teacher.name}; set it to {str(source.encoder.layer_norm_first).lower()}"
        )


def _encoder(teacher, field):
    if not isinstance(teacher.model, HubertEncoder):
        raise InputError(
            f"{field} needs the checkpoint of a teacher that fairseq trained, which task.teacher={teacher.name} is not"
        )
    return teacher.model


def _copy(source, target, name, field, teacher):
    theirs, ours = (
        {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} for module in (source, target)
    )
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{field}: {name}.{key} has the shape {ours.get(key, 'none')} in the student and"
                f" {theirs.get(key, 'none')} in task.teacher={teacher.name}; give the student the teacher's shape there"
            )
    target.load_state_dict(source.state_dict())
