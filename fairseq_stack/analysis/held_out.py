"""How much of the teacher a student predicts on speech that it was not trained on."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fairseq_stack.checkpoints.read import configurations, load_checkpoint
from fairseq_stack.criterions.layer_mapping import student_position
from fairseq_stack.criterions.losses import LOSSES, normalize_targets
from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import Manifest, read_manifest
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.growth.similarity import explained_variance
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON, normalize_waveforms
from fairseq_stack.tables import markdown_table
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.base import Teacher

LONGEST_SECONDS = 10  # longer utterances are cut: attention over a minute costs much and changes the result little


class NoHeads(InputError):
    """The student has no trained heads that predict the teacher's hidden states."""


class HeldOut(NamedTuple):
    """A student, its teacher, and speech to compare them on.

    Attributes:
        student: a StackedHubert in eval mode.
        teacher: its Teacher.
        manifest: a Manifest of held-out speech.
        epsilon: added to the variance when the student's waveforms are normalised; None if they are not normalised.
        normalization: of the targets in the student's training, see normalize_targets.
        layers: the teacher layers that the student was trained to predict.
    """

    student: Any
    teacher: Teacher
    manifest: Manifest
    epsilon: float | None
    normalization: str
    layers: list[int]


def read_held_out(checkpoint: str | Path, speech: str | Path, teacher_path: str | Path | None = None) -> HeldOut:
    """Reads and checks a checkpoint's student, its teacher and held-out speech.

    Args:
        checkpoint: the file. Its model needs fairseq.
        speech: manifest of held-out speech.
        teacher_path: see load_teacher; None for the one that the student was trained with.

    Raises:
        NoHeads: the student has no trained heads.
        InputError: a file cannot be read, or the student was trained with another teacher.
    """
    try:
        from fairseq_stack.models.stacked_hubert import StackedHubert
        from fairseq_stack.tasks.speech_distillation import check_frames
    except ModuleNotFoundError as error:
        raise InputError(f"{checkpoint}: the training model needs {error.name}, which is not installed") from None

    state = load_checkpoint(checkpoint)
    config, task = configurations(state)
    if config is None or task is None or config.get("_name") != "stacked_hubert":
        raise InputError(f"{checkpoint} is no checkpoint of a distillation; give RUN/checkpoints/checkpoint_last.pt")
    criterion = state["cfg"].get("criterion") or {}
    if not any(str(name).startswith("heads.") for name in state["model"]):
        raise NoHeads(
            f"{checkpoint} was trained with criterion.loss={config.get('loss')}, which has no heads: it predicts no"
            " hidden states of the teacher, so there is no variance explained; compare such students by probes"
            " (fairseq-stack evaluate)"
        )
    if getattr(LOSSES.get(config.get("loss", "")), "codes", ""):
        raise NoHeads(
            f"{checkpoint} was trained with criterion.loss={config['loss']}: it predicts codes and no hidden states of"
            " the teacher, so there is no variance explained; compare such students by probes (fairseq-stack evaluate)"
        )
    manifest = read_manifest(speech)
    if teacher_path is None and not Path(task.get("teacher") or "").exists():
        raise InputError(
            f"{checkpoint} was trained with task.teacher={task.get('teacher')}, which does not exist; give its"
            " new path with --teacher"
        )
    teacher: Teacher = load_teacher(teacher_path or task["teacher"], task.get("whisper_pad", False))
    student = StackedHubert.from_checkpoint(state, str(checkpoint), teacher.depth)
    # With an intermediate weight of 0, only the head of the last layer was trained.
    trained = criterion.get("intermediate_weight", 1)
    layers = [layer for layer in student.head_widths if trained or layer == teacher.depth]
    if not layers:
        raise NoHeads(f"{checkpoint} has no heads that were trained: it predicts no hidden states of the teacher")
    try:
        deepest = max(student.head_widths)
        if deepest > teacher.depth or config["output_weight"] and deepest != teacher.depth:
            raise InputError(f"it has {teacher.depth} layers, and the student has learned from layer {deepest}")
        for layer, width in student.head_widths.items():
            student_position(layer, teacher.depth, student.depth, config["intermediate_style"])
            if width != teacher.width:
                raise InputError(f"its hidden states have {teacher.width} features, and the student predicts {width}")
        check_frames(student, teacher, LONGEST_SECONDS * SAMPLE_RATE)
    except InputError as error:
        raise InputError(
            f"{teacher.name} is not the teacher of {checkpoint} ({error}); give the one it was trained with"
        ) from None
    epsilon = task.get("normalize_epsilon", FAIRSEQ_EPSILON) if task["normalize"] else None
    return HeldOut(student, teacher, manifest, epsilon, criterion.get("target_normalization", "none"), layers)


def explained_before_and_after(held_out: HeldOut, seconds: float = 120.0) -> tuple[dict[int, float], dict[int, float]]:
    """Returns explained_by_layer of a student and of the same student with new random weights.

    Args:
        held_out: from read_held_out.
        seconds: how much speech to use.
    """
    torch.manual_seed(1)
    fresh = held_out._replace(student=held_out.student.at_initialisation())
    return explained_by_layer(*held_out, seconds), explained_by_layer(*fresh, seconds)


@torch.no_grad()
def explained_by_layer(
    student: Any,
    teacher: Teacher,
    manifest: Manifest,
    epsilon: float | None,
    normalization: str,
    layers: list[int],
    seconds: float = 120.0,
) -> dict[int, float]:
    """Returns the share of the teacher's variance that the student's trained heads explain, by teacher layer.

    Utterances are processed one by one in the manifest's order. Each is cut to LONGEST_SECONDS.

    Args:
        student, teacher, manifest, epsilon, normalization, layers: see HeldOut.
        seconds: how much speech to use.

    Returns:
        {teacher layer: 1 - squared error / variance}. 1 is perfect, 0 is as good as predicting the mean frame, and
        a negative value is worse than that.

    Raises:
        InputError: a recording cannot be read, or the teacher's features do not vary.
    """
    predictions, targets = {layer: [] for layer in layers}, {layer: [] for layer in layers}
    samples_left = seconds * SAMPLE_RATE
    for index in range(len(manifest)):
        if samples_left <= 0:
            break
        samples = min(int(manifest.samples[index]), LONGEST_SECONDS * SAMPLE_RATE)
        if teacher.frames(samples) < 1:
            continue
        samples_left -= samples
        waveform, length = torch.from_numpy(read_audio(manifest.path(index), 0, samples))[None], torch.tensor([samples])
        hidden_states = teacher.hidden_states(waveform, length, layers)
        x = waveform if epsilon is None else normalize_waveforms(waveform, length, epsilon)
        predicted = student(x, length)["predictions"]
        for layer in layers:
            predictions[layer].append(predicted[layer][0])
            target = hidden_states[layer]
            target = normalize_targets(target, torch.ones(target.shape[:2], dtype=torch.bool), normalization)
            targets[layer].append(target[0])
    if not all(predictions.values()):
        raise InputError(f"{manifest.root}: every recording of the manifest is shorter than a frame; give other speech")
    with input_errors(f"{manifest.root}: the manifest's speech cannot be used"):
        return {
            layer: explained_variance(torch.cat(predictions[layer]).numpy(), torch.cat(targets[layer]).numpy())
            for layer in layers
        }


def explained_table(trained: dict[int, float], fresh: dict[int, float]) -> str:
    """Returns the result of `explained_before_and_after` as a Markdown table."""
    rows = [[str(layer), f"{trained[layer]:.3f}", f"{fresh[layer]:.3f}"] for layer in trained]
    return markdown_table(["teacher layer", "trained student", "same student at its initialisation"], rows)
