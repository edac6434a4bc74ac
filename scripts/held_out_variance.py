"""Print how much of the held-out teacher variance a student explains, beside a student at its initialisation."""

import argparse

import torch

from fairseq_stack.analysis.held_out import explained_by_layer
from fairseq_stack.checkpoint import load_checkpoint
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import one_line_errors
from fairseq_stack.models.stacked_hubert import StackedHubert
from fairseq_stack.teachers import load_teacher


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="fairseq checkpoint of the student")
    parser.add_argument("--speech", required=True, help="manifest of held-out speech, such as DIR/test.tsv")
    parser.add_argument("--teacher", help="file or folder of the teacher (default: the one it was trained with)")
    parser.add_argument("--seconds", type=float, default=120.0, help="speech to use (default: %(default)s)")
    arguments = parser.parse_args()

    state = load_checkpoint(arguments.checkpoint)
    student = StackedHubert.from_checkpoint(state, arguments.checkpoint)
    manifest = read_manifest(arguments.speech)
    task = state["cfg"]["task"]
    teacher = load_teacher(arguments.teacher or task["teacher"], task.get("whisper_pad", False))
    torch.manual_seed(1)
    fresh = student.at_initialisation()
    shares = [
        explained_by_layer(model, teacher, manifest, task["normalize"], arguments.seconds)
        for model in (student, fresh)
    ]
    print("share of the held-out teacher variance explained (1 is all, 0 is none)")
    print("| teacher layer | trained student | same student at its initialisation |")
    print("| ---: | ---: | ---: |")
    for layer in shares[0]:
        print(f"| {layer} | {shares[0][layer]:.3f} | {shares[1][layer]:.3f} |")


if __name__ == "__main__":
    main()
