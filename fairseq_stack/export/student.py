"""Export the student of a checkpoint and verify it on speech."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fairseq_stack.checkpoints.read import configurations, load_checkpoint
from fairseq_stack.checkpoints.student import Student, student_from_checkpoint, with_moving_average
from fairseq_stack.errors import InputError, check_choice, input_errors
from fairseq_stack.export.card import before_full_depth, model_card
from fairseq_stack.export.finetuned import FineTuned, from_fairseq, from_transformers
from fairseq_stack.export.formats import FORMATS, Format, Outputs
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import (
    check_may_write,
    chosen_states,
    padded_batch,
    verification_speech,
    write_verified,
)

logger = logging.getLogger(__name__)


def export(
    checkpoint: str | Path,
    to: str,
    output: str | Path,
    speech: Path | None = None,
    ema: bool = False,
    force: bool = False,
    **choices: str,
) -> dict:
    """Export the student of a checkpoint.

    Args:
        checkpoint: path of a fairseq checkpoint of a student, or of a fine-tuned student: a checkpoint of fairseq's
            `hubert_ctc`, or a folder that transformers saved.
        to: a name in FORMATS.
        output: path of the folder or file to make.
        speech: audio file or manifest to verify with (default: the validation data of the distillation).
        ema: export the moving average of the weights.
        force: replace an existing export.
        choices: `precision` and `hidden_states`, for a format that has them.

    Returns:
        the comparison with the training model, as stored with the export.

    Raises:
        InputError: an argument cannot be used, or the format cannot hold this student.
        ExportMismatch: the export computes something else than the training model.
    """
    format: Format = FORMATS.choose(to)
    _check_choices(to, choices)
    check_may_write(output, force)
    tuned = from_transformers(Path(checkpoint)) if Path(checkpoint).is_dir() else None
    state = {} if tuned else load_checkpoint(checkpoint)
    if not tuned and (configurations(state)[0] or {}).get("_name") == "hubert_ctc":
        tuned = from_fairseq(state, Path(checkpoint))
    if tuned and ema:
        raise InputError(f"--ema: {checkpoint} is fine-tuned; leave the option out")
    if tuned:
        return _export_fine_tuned(tuned, str(checkpoint), to, output, speech, force, choices)
    if ema:
        state = with_moving_average(state, str(checkpoint))
    student = student_from_checkpoint(state, str(checkpoint))
    if before_full_depth(student):
        logger.warning(
            f"{checkpoint}: {before_full_depth(student)}; export a later checkpoint of the run, or resume its training"
        )
    subsets = (state["cfg"].get("dataset") or {}).get("valid_subset", "valid")
    speech = speech or Path(state["cfg"]["task"].get("data") or "") / f"{subsets.split(',')[0]}.tsv"
    if not speech.is_file():
        raise InputError(f"{speech} does not exist; give --speech an audio file or a manifest to verify with")
    waveforms = verification_speech(speech, student.conv_layers)
    normalization, reason = None, format.normalization(student)
    if reason and format.normalizer:
        normalized_like_format = replace(student, normalize_epsilon=format.normalizer[1])
        normalization = reason, training_model(state, normalized_like_format, str(checkpoint))[1]

    def card(proof: dict) -> str:
        with input_errors(f"{checkpoint} has a configuration that describes no training"):
            return model_card(student, state, proof, ema)

    name, reference = training_model(state, student, str(checkpoint))
    hidden_states = choices.get("hidden_states", "all")
    return write_verified(
        partial(format.write, student, **choices),
        partial(format.load, student=student, **choices),
        lambda waveforms: chosen_states(reference(waveforms), hidden_states),
        waveforms,
        student.conv_layers,
        output,
        force,
        format.padding(student),
        normalization,
        {"format": to, **choices, "compared_with": name},
        card,
        choices.get("precision", "fp32"),
    )


def _export_fine_tuned(
    tuned: FineTuned,
    name: str,
    to: str,
    output: str | Path,
    speech: Path | None,
    force: bool,
    choices: dict[str, str],
) -> dict:
    """Export a fine-tuned student; arguments, result and errors are those of `export`."""
    format = FORMATS[to]
    if not format.fine_tuned:
        able = " or ".join(other for other in FORMATS if FORMATS[other].fine_tuned)
        raise InputError(f"{name} is fine-tuned, and --to {to} has no place for its output layers; use --to {able}")
    if "hidden_states" in choices:
        raise InputError(f"--hidden-states {choices['hidden_states']}: {name} is fine-tuned and has only logits")
    if not speech or not speech.is_file():
        problem = f"{speech} does not exist" if speech else f"{name} is fine-tuned and names no speech"
        raise InputError(f"{problem}; give --speech an audio file or a manifest to verify with")
    return write_verified(
        partial(format.write, tuned.student, **choices),
        partial(format.load, student=tuned.student, **choices),
        tuned.reference,
        verification_speech(speech, tuned.student.conv_layers),
        tuned.student.conv_layers,
        output,
        force,
        facts={"format": to, **choices, "compared_with": tuned.name},
        precision=choices.get("precision", "fp32"),
    )


def _check_choices(to: str, choices: dict[str, str]) -> None:
    """Raise InputError unless the format `to` has each of the choices."""
    for name, value in choices.items():
        option = f"--{name.replace('_', '-')}"
        if name not in FORMATS[to].choices:
            able = " or ".join(other for other in FORMATS if name in FORMATS[other].choices)
            raise InputError(f"{option} {value}: --to {to} has no such choice; export with --to {able}")
        check_choice(option, value, FORMATS[to].choices[name])


def training_model(state: dict, student: Student, checkpoint: str) -> tuple[str, Outputs]:
    """The model to compare an export with: the training model, or without fairseq its weights in plain PyTorch.

    Returns:
        its name and its Outputs.
    """
    try:
        from fairseq_stack.models.stacked_hubert import StackedHubert
    except ImportError:
        name, plain = "the same weights in plain PyTorch (fairseq is not installed)", PlainStudent(student)
        return name, lambda waveforms: plain.outputs(*padded_batch(waveforms))
    model = StackedHubert.from_checkpoint(state, str(checkpoint))

    def outputs(waveforms: list[Tensor]) -> dict[int | str, Tensor]:
        output = model(*padded_batch(waveforms, student.normalize_epsilon if student.normalize else None))
        heads = {f"head {layer}": prediction for layer, prediction in output["predictions"].items()}
        return {**dict(enumerate(output["hidden_states"])), **heads}

    return "the training model", outputs
