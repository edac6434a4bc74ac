"""The targets of a batch: from the teacher, or from a store that the teacher fills."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fairseq_stack.targets.formats import decode, encode
from fairseq_stack.targets.store import CNN, Array, TargetStore

if TYPE_CHECKING:
    from fairseq_stack.teachers.base import CnnTeacher, Teacher

logger = logging.getLogger(__name__)


def targets_of(
    sample: dict, teacher: "Teacher", layers: Sequence[int], cnn: bool, store: TargetStore | None = None
) -> dict[Array, Tensor]:
    """Return the teacher's hidden states for a batch, {layer: [B, T, D]}; with `cnn` also {CNN: [B, T, C]}.

    Args:
        sample: a batch of a SpeechDataset.
        teacher: a Teacher.
        layers: numbers of the teacher's layers.
        cnn: whether the features of the teacher's CNN are targets too.
        store: a TargetStore for the same layers and `cnn`; without one, the teacher computes the targets.

    Raises:
        InputError: the store cannot be written.
    """
    if store is None:
        return _computed(sample, teacher, layers, cnn)
    return {name: decode(parts) for name, parts in stored_targets(sample, teacher, store).items()}


def stored_targets(sample: dict, teacher: "Teacher", store: TargetStore) -> dict[Array, dict[str, Tensor]]:
    """Return a batch's targets as the store keeps them, {array: {part: [B, T, ...]}}.

    The teacher computes what is missing, and the store keeps it. The student always learns from rounded
    targets, in the first epoch too, so that a run does not depend on how much was stored before it.

    Args and Raises: see targets_of.
    """
    rows, entries, stored = sample["stored_rows"], sample["entries"], sample["stored"]
    if rows and not entries:
        return stored
    for entry in entries.values():
        if entry.problem:
            logger.warning(f"target store | computed again, because {entry.problem} ({entry.utterance})")
    layers = [layer for layer in store.arrays if isinstance(layer, int)]
    arrays = _computed(sample, teacher, layers, CNN in store.arrays)
    arrays = {name: encode(values, store.form) for name, values in arrays.items()}
    store.write(entries, arrays)
    for name, parts in stored.items():
        for part, values in parts.items():
            arrays[name][part][rows, : values.size(1)] = values
    return {name: arrays[name] for name in store.wanted}


def _computed(sample: dict, teacher: "Teacher", layers: Sequence[int], cnn: bool) -> dict[Array, Tensor]:
    waveforms, lengths = sample["waveforms"], torch.as_tensor(sample["lengths"])
    if not cnn:
        return {**teacher.hidden_states(waveforms, lengths, layers)}
    teacher = cast("CnnTeacher", teacher)
    features = teacher.cnn_features(waveforms, lengths)
    targets = teacher.hidden_states(waveforms, lengths, layers, features)
    return {**targets, CNN: features.transpose(1, 2)}
