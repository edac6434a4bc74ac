"""The targets of a batch: from the teacher, or from a store that the teacher fills."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from fairseq_stack.errors import InputError
from fairseq_stack.targets.codebooks import learn_codebooks
from fairseq_stack.targets.store import CNN, Array, TargetStore

if TYPE_CHECKING:
    from fairseq_stack.data.dataset import SpeechDataset
    from fairseq_stack.teachers.base import CnnTeacher, Teacher

logger = logging.getLogger(__name__)

LEARNING_FRAMES = 50_000  # to learn codebooks from; 200 for each entry of a byte
HELD_OUT_FRAMES = 5_000  # to measure what the codes keep
FRAMES_OF_A_WINDOW = 100  # so that they come from many recordings


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
    return {name: store.decode(name, parts) for name, parts in stored_targets(sample, teacher, store).items()}


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
    arrays = store.encode(arrays, entries)
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


def learn_all_codebooks(store: TargetStore, teacher: "Teacher", dataset: "SpeechDataset", device: torch.device) -> None:
    """Learn and store the codebooks that a store lacks, from a random sample of the teacher's frames.

    The sample depends on the dataset alone. Processes that learn at the same time all take what the first one stores.

    Args:
        store: of a format of codes.
        teacher: a Teacher.
        dataset: a SpeechDataset for training.
        device: where the teacher computes.

    Raises:
        InputError: there are too few frames, a frame is not finite, or the codebooks cannot be written.
    """
    assert store.shape is not None
    missing = store.without_codebooks
    logger.info(f"target store | learns {store.form} from a sample of {dataset.split}")
    sample: dict[Array, list[Tensor]] = {name: [] for name in missing}
    frames = 0
    for utterance, arrays in _sampled(teacher, dataset, missing, device):
        for name in missing:
            if not arrays[name].isfinite().all():
                raise InputError(
                    f"the teacher's output for {utterance} is not finite; look for what is wrong with the teacher"
                )
            sample[name].append(arrays[name])
        frames += len(arrays[missing[0]])
        if frames >= LEARNING_FRAMES + HELD_OUT_FRAMES:
            break
    held_out = min(HELD_OUT_FRAMES, frames // 10)
    if frames - held_out < store.shape[1]:
        raise InputError(
            f"task.target_format={store.form} learns {store.shape[1]} entries, but {dataset.split} has only {frames}"
            " frames to learn from; choose another format, or train on more speech"
        )
    for name in missing:
        states = torch.cat(sample.pop(name))
        store.keep_codebooks(name, learn_codebooks(states[held_out:], states[:held_out], *store.shape))


def _sampled(
    teacher: "Teacher", dataset: "SpeechDataset", names: Sequence[Array], device: torch.device
) -> Iterator[tuple[str, dict[Array, Tensor]]]:
    """Yield random frames {array: [T, D]} of windows in random order, with the name of the utterance."""
    dataset = copy.copy(dataset)
    dataset.store = None  # all audio is read
    random = np.random.default_rng(0)
    layers = [name for name in names if isinstance(name, int)]
    for index in random.permutation(np.flatnonzero(dataset.window_counts)):
        number = int(random.integers(dataset.window_counts[index]))
        batch = dataset.collater([dataset.load_window(int(index), number)])
        if not batch["utterances"]:
            continue  # the audio cannot be read; the training will say so
        batch["waveforms"] = batch["waveforms"].to(device)
        arrays = _computed(batch, teacher, layers, CNN in names)
        count = len(arrays[names[0]][0])
        chosen = torch.from_numpy(np.sort(random.permutation(count)[:FRAMES_OF_A_WINDOW]))
        yield batch["utterances"][0], {name: arrays[name][0].cpu()[chosen] for name in names}
