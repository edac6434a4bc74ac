"""Export the student of a checkpoint, verified on speech before it gets its name."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint, with_moving_average
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.export.card import before_full_depth, model_card
from fairseq_stack.export.formats import FORMATS
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import (
    check_output,
    padded_batch,
    read_speech,
    write_verified,
)

logger = logging.getLogger(__name__)


def export(checkpoint, to, output, speech=None, ema=False, force=False):
    """Export the student of a checkpoint.

    Args:
        checkpoint: path of a fairseq checkpoint.
        to: a name in FORMATS.
        output: path of the folder or file to make.
        speech: audio file or manifest to verify with (default: the validation data of the training).
        ema: take the moving average of the weights.
        force: replace an export that is there already.

    Returns:
        the comparison, as stored with the export.

    Raises:
        InputError: something cannot be used, or the format cannot hold this student.
        ExportMismatch: the export computes something else than the training model.
    """
    format = FORMATS.choose(to)
    check_output(output, force)
    state = load_checkpoint(checkpoint)
    if ema:
        state = with_moving_average(state, checkpoint)
    student = student_from_checkpoint(state, checkpoint)
    if before_full_depth(student):
        logger.warning(
            f"{checkpoint}: {before_full_depth(student)}; export a later checkpoint of the run, or let it train on"
        )
    subsets = (state["cfg"].get("dataset") or {}).get("valid_subset", "valid")
    speech = speech or Path(state["cfg"]["task"].get("data") or "") / f"{subsets.split(',')[0]}.tsv"
    if not speech.is_file():
        raise InputError(f"{speech} does not exist; give --speech an audio file or a manifest to verify with")
    waveforms = read_speech(speech, student.conv_layers)
    normalization = format.normalization(student)
    if normalization:
        alike = replace(student, normalize_epsilon=format.normalizer[1])
        normalization = normalization, training_model(state, alike, checkpoint)[1]

    def card(proof):
        with input_errors(f"{checkpoint} has a configuration that describes no training"):
            return model_card(student, state, proof, ema)

    name, reference = training_model(state, student, checkpoint)
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


def training_model(state, student, checkpoint):
    """What to compare an export with: the training model, or without fairseq the same weights in plain PyTorch.

    Returns:
        its name, and a function from a list of [S] to {name: [B, T, D]}.
    """
    try:
        from fairseq_stack.models.stacked_hubert import StackedHubert
    except ImportError:
        name, model = "the same weights in plain PyTorch (fairseq is not installed)", PlainStudent(student)
        return name, lambda waveforms: model.outputs(*padded_batch(waveforms))
    model = StackedHubert.from_checkpoint(state, checkpoint)

    def outputs(waveforms):
        output = model(*padded_batch(waveforms, student.normalize_epsilon if student.normalize else None))
        heads = {f"head {layer}": prediction for layer, prediction in output["predictions"].items()}
        return {**dict(enumerate(output["hidden_states"])), **heads}

    return "the training model", outputs
