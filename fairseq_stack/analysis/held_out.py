"""How much of the teacher a student predicts on speech that it has not heard."""

import torch

from fairseq_stack.analysis.similarity import explained_variance
from fairseq_stack.checkpoint import load_checkpoint
from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.waveforms import normalize_waveforms
from fairseq_stack.losses import normalize_targets
from fairseq_stack.teachers import load_teacher

LONGEST_SECONDS = 10  # of an utterance; attention over a whole minute would cost more than it tells


def explained_by_checkpoint(checkpoint, speech, teacher=None, seconds=120.0, at_initialisation=False):
    """What the student of a fairseq checkpoint explains.

    Args:
        checkpoint: the file. To run the training model, fairseq has to be installed.
        speech: manifest of held-out speech.
        teacher: see load_teacher; None for the one that the student was trained with.
        seconds: how much speech to use.
        at_initialisation: ask a student of the same shape and depth with new random weights instead.

    Returns:
        see explained_by_layer.

    Raises:
        InputError: something of it cannot be read.
    """
    from fairseq_stack.models.stacked_hubert import StackedHubert

    state = load_checkpoint(checkpoint)
    manifest = read_manifest(speech)
    task = state["cfg"]["task"]
    teacher = load_teacher(teacher or task["teacher"], task.get("whisper_pad", False))
    student = StackedHubert.from_checkpoint(state, checkpoint)
    if at_initialisation:
        torch.manual_seed(1)
        student = student.at_initialisation()
    normalization = state["cfg"]["criterion"]["target_normalization"]
    return explained_by_layer(student, teacher, manifest, task["normalize"], normalization, seconds)


@torch.no_grad()
def explained_by_layer(student, teacher, manifest, normalize, normalization="none", seconds=120.0):
    """Share of the teacher's variance that the student's heads explain, for each head.

    Utterances pass one by one in the manifest's order, each up to LONGEST_SECONDS.

    Args:
        student: a StackedHubert in eval mode.
        teacher: its Teacher.
        manifest: a Manifest of held-out speech.
        normalize: whether the student wants normalised waveforms.
        normalization: of the targets that the student has learned, see normalize_targets.
        seconds: how much speech to use.

    Returns:
        {teacher layer: 1 - squared error / variance}; 1 is perfect, 0 is as good as the mean frame,
        below 0 is worse.

    Raises:
        InputError: a recording cannot be read.
    """
    layers = [int(layer) for layer in student.heads]
    predictions, targets = {layer: [] for layer in layers}, {layer: [] for layer in layers}
    left = seconds * SAMPLE_RATE
    for index in range(len(manifest)):
        if left <= 0:
            break
        samples = min(int(manifest.samples[index]), LONGEST_SECONDS * SAMPLE_RATE)
        left -= samples
        waveform, length = torch.from_numpy(read_audio(manifest.path(index), 0, samples))[None], torch.tensor([samples])
        wanted = teacher.hidden_states(waveform, length, layers)
        given = student(normalize_waveforms(waveform, length) if normalize else waveform, length)["predictions"]
        for layer in layers:
            predictions[layer].append(given[layer][0])
            target = wanted[layer]
            target = normalize_targets(target, torch.ones(target.shape[:2], dtype=torch.bool), normalization)
            targets[layer].append(target[0])
    return {
        layer: explained_variance(torch.cat(predictions[layer]).numpy(), torch.cat(targets[layer]).numpy())
        for layer in layers
    }
