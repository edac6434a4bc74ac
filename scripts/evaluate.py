"""Probe how good exported students are, by SUPERB's protocol in small, and print a table."""

import argparse
import sys
import warnings
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from fairseq_stack.analysis.held_out import NoHeads, read_held_out
from fairseq_stack.errors import check_output, one_line_errors
from fairseq_stack.evaluation.results import (
    add_held_out,
    held_out_table,
    run,
    table,
    upstreams,
)


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "exports",
        nargs="+",
        metavar="EXPORT",
        help="what scripts/export_student.py made: a huggingface folder, or a file for s3prl. A student of the"
        " shape of the first, started at random, is a row of the table",
    )
    parser.add_argument(
        "--speech", required=True, metavar="DIR", help="folder with labels that scripts/prepare_speech.py made"
    )
    parser.add_argument(
        "--teacher",
        metavar="PATH",
        help="add the teacher: a fairseq checkpoint (needs fairseq) or a folder in Hugging Face's format",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="fairseq checkpoint of the student, to tell how much of the held-out teacher variance it explains"
        " (needs fairseq)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="probes of each kind (default: %(default)s)")
    parser.add_argument(
        "--output",
        default="outputs/probes.json",
        metavar="FILE",
        help="where all numbers go; what it holds already is not computed again (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: give 1 or more")
    # What the libraries say while they load a model is not about the student.
    warnings.filterwarnings("ignore")
    disable_progress_bar()

    # The probes take long: what is wrong is said before.
    check_output("--output", arguments.output)
    seeds = range(1, arguments.seeds + 1)
    rows = upstreams(arguments.exports, arguments.teacher)
    held_out, without = None, None
    if arguments.checkpoint:
        try:
            held_out = read_held_out(arguments.checkpoint, Path(arguments.speech, "test.tsv"), arguments.teacher)
        except NoHeads as error:
            without = f"no held-out variance: {error}"
            print(f"note: {without}", file=sys.stderr)
    results = run(rows, arguments.speech, seeds, arguments.output)
    print(table(results, seeds))
    for task, reason in results["without"].items():
        print(f"no {task}: {reason}")
    if without:
        print(without)
    if held_out:
        entry = add_held_out(arguments.output, held_out, arguments.checkpoint, arguments.speech)
        print("\nshare of the held-out teacher variance explained (1 is all, 0 is none)\n")
        print(held_out_table(entry))


if __name__ == "__main__":
    main()
