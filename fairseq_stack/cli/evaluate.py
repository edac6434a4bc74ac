"""Probe exported students by a small version of SUPERB's protocol and print a table.

The table also has rows for log-mel features and for a student with random weights and
the shape of the first export that is no ONNX file.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_stack.errors import check_output, check_positive


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "exports", nargs="+", metavar="EXPORT",
        help="an export by fairseq-stack: a huggingface folder, a file for s3prl, or an ONNX file",
    )  # fmt: skip
    parser.add_argument(
        "--speech", required=True, metavar="FOLDER", help="folder with labels that fairseq-stack prepare made"
    )
    parser.add_argument(
        "--teacher", metavar="PATH",
        help="add the teacher: a fairseq checkpoint (needs fairseq) or a folder in Hugging Face's format",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help="fairseq checkpoint of the student, to measure how much of the held-out teacher variance it explains"
             " (needs fairseq)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each probe (default: %(default)s)")
    parser.add_argument(
        "--output", default="outputs/probes.json", metavar="FILE",
        help="file for all numbers; numbers that it already has are not computed again (default: %(default)s)",
    )  # fmt: skip


def run(args: Namespace) -> None:
    import sys

    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.analysis.held_out import NoHeads, explained_table, read_held_out
    from fairseq_stack.evaluation.results import add_held_out, difference_table, probe_table, run_probes, upstream_rows

    # The probes take long: check all arguments before.
    check_positive("--seeds", args.seeds)
    check_output("--output", args.output)
    seeds = range(1, args.seeds + 1)
    rows = upstream_rows(args.exports, args.teacher)
    held_out, without = None, None
    if args.checkpoint:
        try:
            held_out = read_held_out(args.checkpoint, Path(args.speech, "test.tsv"), args.teacher)
        except NoHeads as error:
            without = f"no held-out variance: {error}"
            print(f"note: {without}", file=sys.stderr)
    results = run_probes(rows, args.speech, seeds, args.output)
    print(probe_table(results, seeds))
    print(f"\ndifference from {next(iter(rows))} in points, with its 95 % interval over test recordings\n")
    print(difference_table(results, seeds))
    for task, reason in results["without"].items():
        print(f"no {task}: {reason}")
    if without:
        print(without)
    if held_out:
        entry = add_held_out(args.output, held_out, args.checkpoint, args.speech)
        print("\nshare of the held-out teacher variance explained (1 is all, 0 is none)\n")
        print(explained_table(entry["shares"], entry["at_initialisation"]))
