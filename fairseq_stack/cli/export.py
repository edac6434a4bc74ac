"""Export a trained student to another library and verify the export on speech.

formats:
  huggingface      a folder for transformers.HubertModel and s3prl's hf_hubert_custom
  s3prl            a file for s3prl's hubert_local
  s3prl-distiller  a file for s3prl's distiller_local, with the prediction heads; its
                   first hidden state comes before the positions
  fairseq          a checkpoint of fairseq's stock HubertModel, for model.w2v_path of
                   hubert_ctc
  onnx             a file for onnxruntime, for batches of any size and length
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path,
        help="fairseq checkpoint of a student, at any stage of its growth; or a fine-tuned student, which is a"
             " checkpoint of hubert_ctc or a folder of transformers",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="FORMAT", help="one of the formats above")
    parser.add_argument("--output", required=True, type=Path, help="folder or file to make")
    parser.add_argument(
        "--speech", type=Path,
        help="audio file or manifest (.tsv), 16 kHz mono, on which to compare the export with the training model"
             " (default: the student's validation data)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", metavar="fp32|fp16|int8",
        help="of an ONNX file (default: fp32); int8 quantises matrix products alone",
    )  # fmt: skip
    parser.add_argument(
        "--hidden-states", metavar="all|last|weighted",
        help="outputs of an ONNX file (default: all)",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    parser.add_argument(
        "--force", action="store_true", help="replace an existing export once the new one is verified (default: refuse)"
    )


def run(args: Namespace) -> str | None:
    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.export.student import export
    from fairseq_stack.export.verify import ExportMismatch, difference_table

    choices = {"precision": args.precision, "hidden_states": args.hidden_states}
    choices = {name: value for name, value in choices.items() if value is not None}
    try:
        proof = export(args.checkpoint, args.to, args.output, args.speech, args.ema, args.force, **choices)
    except ExportMismatch as error:
        return f"error: {error}"
    print(difference_table(proof))
    print(
        f"{args.to}: {args.output}, largest difference to {proof['compared_with']}"
        f" {proof['largest_difference_alone']:.2g} alone, {proof['largest_difference_padded']:.2g} in a padded batch"
        f" ({proof['measure']})"
    )
    print(f"padding: {proof['padding']}")
    if "normalization" in proof:
        print(
            f"normalisation: {proof['normalization']}; if both normalise in the same way, the largest difference is"
            f" {proof['largest_difference_normalized_alike']:.2g}"
        )
    return None
