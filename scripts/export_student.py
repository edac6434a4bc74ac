"""Export a trained student to transformers or s3prl, verified on speech before it gets its name."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fairseq_stack.checkpoint import load_checkpoint, student_from_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.export.huggingface import export_huggingface, load_huggingface
from fairseq_stack.export.s3prl import export_s3prl, load_s3prl
from fairseq_stack.export.verify import ExportMismatch, check_output, read_speech, write_verified


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="fairseq checkpoint of a stacked_hubert, at any stage")
    parser.add_argument(
        "--to",
        required=True,
        choices=["huggingface", "s3prl"],
        help="huggingface: a folder for transformers.HubertModel and s3prl's hf_hubert_custom;"
        " s3prl: a file for s3prl's hubert_local",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder or file to make; must not exist yet"
    )
    parser.add_argument(
        "--speech",
        type=Path,
        help="audio file or manifest (.tsv), 16 kHz mono, to compare the export with the training model on"
        " (default: valid.tsv of the data that the student was trained on)",
    )
    args = parser.parse_args()
    try:
        difference = export(args)
    except (InputError, ExportMismatch, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.to}: {args.output}, largest difference to the training model {difference:.2g}")


def export(args):
    check_output(args.output)
    state = load_checkpoint(args.checkpoint)
    student = student_from_checkpoint(state, args.checkpoint)
    speech = args.speech or Path(state["cfg"]["task"].get("data") or "") / "valid.tsv"
    if not speech.is_file():
        raise InputError(f"{speech} does not exist; give --speech an audio file or a manifest to verify with")
    waveforms = read_speech(speech, student.conv_layers)
    reference = training_model(state, student.normalize)
    if args.to == "huggingface":
        write = partial(export_huggingface, student)
        load = partial(load_huggingface, normalize=student.normalize)
    else:
        write, load = partial(export_s3prl, student), load_s3prl
    return write_verified(write, load, reference, waveforms, args.output)


def training_model(state, normalize):
    """The hidden states of the training model, as a function of a waveform [S]."""
    from fairseq_stack.models.stacked_hubert import StackedHubert

    model = StackedHubert.from_checkpoint(state)

    def hidden_states(waveform):
        inputs = F.layer_norm(waveform, waveform.shape) if normalize else waveform
        states, _ = model.hidden_states(inputs[None], torch.tensor([len(inputs)]))
        return states

    return hidden_states


if __name__ == "__main__":
    main()
