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
    sample: dict,
    teacher: "Teacher",
    layers: Sequence[int],
    cnn: bool,
    store: TargetStore | None = None,
    codes: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[Array, Tensor]:
    """Return the teacher's hidden states for a batch, {layer: [B, T, D]}; with `cnn` also {CNN: [B, T, C]}.

    Args:
        sample: a batch of a SpeechDataset.
        teacher: a Teacher.
        layers: numbers of the teacher's layers.
        cnn: whether the features of the teacher's CNN are targets too.
        store: a TargetStore for the same layers and `cnn`; without one, the teacher computes the targets.
        codes: whether to return the store's codes [B, T, codebooks] in place of hidden states.
        dtype: precision of the student, in which codes are decoded.

    Raises:
        InputError: the store cannot be written.
    """
    if store is None:
        return _computed(sample, teacher, layers, cnn)
    stored = stored_targets(sample, teacher, store)
    return {
        name: parts["codes"] if codes and name != CNN else store.decode(name, parts, dtype)
        for name, parts in stored.items()
    }


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
    sample: dict[int, list[Tensor]] = {layer: [] for layer in missing}
    frames = 0
    for utterance, states in _sampled(teacher, dataset, missing, device):
        for layer in missing:
            if not states[layer].isfinite().all():
                raise InputError(
                    f"the teacher's layer {layer} for {utterance} is not finite; look for what is wrong with the"
                    " teacher"
                )
            sample[layer].append(states[layer])
        frames += len(states[missing[0]])
        if frames >= LEARNING_FRAMES + HELD_OUT_FRAMES:
            break
    held_out = min(HELD_OUT_FRAMES, frames // 10)
    if frames - held_out < store.shape[1]:
        raise InputError(
            f"task.target_format={store.form} learns {store.shape[1]} entries, but {dataset.split} has only {frames}"
            " frames to learn from; choose another format, or train on more speech"
        )
    for layer in missing:
        frames_of_layer = torch.cat(sample.pop(layer))
        learned = learn_codebooks(frames_of_layer[held_out:], frames_of_layer[:held_out], *store.shape)
        store.keep_codebooks(layer, learned)


def _sampled(
    teacher: "Teacher", dataset: "SpeechDataset", layers: Sequence[int], device: torch.device
) -> Iterator[tuple[str, dict[int, Tensor]]]:
    """Yield random frames {layer: [T, D]} of windows in random order, with the name of the utterance."""
    dataset = copy.copy(dataset)
    dataset.store = None  # all audio is read
    random = np.random.default_rng(0)
    for index in random.permutation(np.flatnonzero(dataset.window_counts)):
        number = int(random.integers(dataset.window_counts[index]))
        batch = dataset.collater([dataset.load_window(int(index), number)])
        if not batch["utterances"]:
            continue  # the audio cannot be read; the training will say so
        lengths = torch.as_tensor(batch["lengths"])
        states = teacher.hidden_states(batch["waveforms"].to(device), lengths, layers)
        chosen = torch.from_numpy(np.sort(random.permutation(states[layers[0]].size(1))[:FRAMES_OF_A_WINDOW]))
        yield batch["utterances"][0], {layer: states[layer][0].cpu()[chosen] for layer in layers}
