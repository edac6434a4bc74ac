"""Export a trained student to other libraries, verified on speech before it gets its name."""

import argparse
import logging
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint, with_moving_average
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.export.card import before_full_depth, model_card
from fairseq_stack.export.formats import FORMATS
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import (
    ExportMismatch,
    check_output,
    padded_batch,
    read_speech,
    table,
    write_verified,
)

logger = logging.getLogger(__name__)

def main():
    parser = argparse.ArgumentParser(prog="fairseq-stack-export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="fairseq checkpoint of a stacked_hubert, at any stage")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {format.help}" for name, format in FORMATS.items()),
    )
    parser.add_argument("--output", required=True, type=Path, help="folder or file to make")
    parser.add_argument(
        "--speech",
        type=Path,
        help="audio file or manifest (.tsv), 16 kHz mono, to compare the export with the training model on"
        " (default: the student's validation data)",
    )
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    parser.add_argument(
        "--force", action="store_true", help="replace an export, once the new one is verified (default: refuse)"
    )
    args = parser.parse_args()
    # What the libraries say while they load a model is not about the export.
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    try:
        proof = export(args.checkpoint, args.to, args.output, args.speech, args.ema, args.force)
    except (InputError, ExportMismatch, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(proof))
    print(
        f"{args.to}: {args.output}, largest difference to {proof['compared_with']}"
        f" {proof['largest_difference_alone']:.2g} alone, {proof['largest_difference_padded']:.2g} in a padded batch"
    )
    print(f"padding: {proof['padding']}")
    if "normalization" in proof:
        print(
            f"normalisation: {proof['normalization']}; normalised alike, the largest difference is"
            f" {proof['largest_difference_normalized_alike']:.2g}"
        )


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
    format = FORMATS.choose(to)
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


if __name__ == "__main__":
    main()
