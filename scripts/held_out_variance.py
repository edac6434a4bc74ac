"""Print how much of the held-out teacher variance a student explains, beside a student at its initialisation."""

import argparse

from fairseq_stack.analysis.held_out import explained_before_and_after, read_held_out
from fairseq_stack.errors import check_positive, one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="fairseq checkpoint of the student")
    parser.add_argument("--speech", required=True, help="manifest of held-out speech, such as DIR/test.tsv")
    parser.add_argument("--teacher", help="file or folder of the teacher (default: the one it was trained with)")
    parser.add_argument("--seconds", type=float, default=120.0, help="speech to use (default: %(default)s)")
    arguments = parser.parse_args()

    check_positive("--seconds", arguments.seconds)
    held_out = read_held_out(arguments.checkpoint, arguments.speech, arguments.teacher)
    trained, fresh = explained_before_and_after(held_out, arguments.seconds)
    print("share of the held-out teacher variance explained (1 is all, 0 is none)")
    print("| teacher layer | trained student | same student at its initialisation |")
    print("| ---: | ---: | ---: |")
    for layer in trained:
        print(f"| {layer} | {trained[layer]:.3f} | {fresh[layer]:.3f} |")


if __name__ == "__main__":
    main()
