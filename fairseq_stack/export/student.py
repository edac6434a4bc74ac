"""Export the student of a checkpoint and verify it on speech."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import Student, student_from_checkpoint, with_moving_average
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.export.card import before_full_depth, model_card
from fairseq_stack.export.formats import FORMATS, Format, Outputs
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import (
    check_may_write,
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
) -> dict:
    """Export the student of a checkpoint.

    Args:
        checkpoint: path of a fairseq checkpoint.
        to: a name in FORMATS.
        output: path of the folder or file to make.
        speech: audio file or manifest to verify with (default: the validation data of the training).
        ema: export the moving average of the weights.
        force: replace an existing export.

    Returns:
        the comparison with the training model, as stored with the export.

    Raises:
        InputError: an argument cannot be used, or the format cannot hold this student.
        ExportMismatch: the export computes something else than the training model.
    """
    format: Format = FORMATS.choose(to)
    check_may_write(output, force)
    state = load_checkpoint(checkpoint)
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
    return write_verified(
        partial(format.write, student),
        partial(format.load, student=student),
        reference,
        waveforms,
        student.conv_layers,
        output,
        force,
        format.padding(student),
        normalization,
        {"format": to, "compared_with": name},
        card,
    )


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
