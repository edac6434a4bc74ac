"""Where the targets of a batch come from: the teacher at work, or a store that the teacher fills."""

import logging

from fairseq_stack.targets.formats import decode, encode
from fairseq_stack.targets.store import CNN

logger = logging.getLogger(__name__)


def targets_of(sample, teacher, layers, cnn, store=None):
    """The teacher's hidden states for a batch, {layer: [B, T, D]}; with `cnn` also {CNN: [B, T, C]}, of its CNN.

    Args:
        sample: a batch of a SpeechDataset.
        teacher: a Teacher.
        layers: numbers of the teacher's layers.
        cnn: whether the features of its CNN are wanted, too.
        store: a TargetStore that wants the same; without one, the teacher computes them.

    Raises:
        InputError: the store cannot be written.
    """
    if store is None:
        return _computed(sample, teacher, layers, cnn)
    return {name: decode(parts) for name, parts in stored_targets(sample, teacher, store).items()}


def stored_targets(sample, teacher, store):
    """The batch's targets as the store keeps them, {array: {part: [B, T, ...]}}.

    The teacher fills what is missing. The student learns from rounded targets in the first epoch
    too, and from what is stored wherever there is something: so it makes no difference to a run how
    much has been stored before it.

    Args and Raises: see targets_of.
    """
    rows, entries, stored = sample["stored_rows"], sample["entries"], sample["stored"]
    if rows and not entries:
        return stored
    for entry in entries.values():
        if entry.problem:
            logger.warning(f"target store | computed again, because {entry.problem} ({entry.utterance})")
    layers = [name for name in store.arrays if name != CNN]
    arrays = _computed(sample, teacher, layers, CNN in store.arrays)
    arrays = {name: encode(values, store.form) for name, values in arrays.items()}
    store.write(entries, arrays)
    for name, parts in stored.items():
        for part, values in parts.items():
            arrays[name][part][rows, : values.size(1)] = values
    return {name: arrays[name] for name in store.wanted}


def _computed(sample, teacher, layers, cnn):
    waveforms, lengths = sample["waveforms"], sample["lengths"]
    if not cnn:
        return teacher.hidden_states(waveforms, lengths, layers)
    features = teacher.cnn_features(waveforms, lengths)
    targets = teacher.hidden_states(waveforms, lengths, layers, features)
    return {**targets, CNN: features.transpose(1, 2)}
