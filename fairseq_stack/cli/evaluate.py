"""Probe how good exported students are, by SUPERB's protocol in small, and print a table.

A student of the shape of the first export with random weights and log-mel features are
rows of the table, too.
"""

from pathlib import Path

from fairseq_stack.errors import check_output, check_positive


def add_arguments(parser):
    parser.add_argument(
        "exports", nargs="+", metavar="EXPORT",
        help="what fairseq-stack export made: a huggingface folder, or a file for s3prl",
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
        help="fairseq checkpoint of the student, to tell how much of the held-out teacher variance it explains"
             " (needs fairseq)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="probes of each kind (default: %(default)s)")
    parser.add_argument(
        "--output", default="outputs/probes.json", metavar="FILE",
        help="where all numbers go; what it holds already is not computed again (default: %(default)s)",
    )  # fmt: skip


def run(args):
    import sys

    from fairseq_stack.analysis.held_out import NoHeads, read_held_out
    from fairseq_stack.cli.quiet import quiet_libraries
    from fairseq_stack.evaluation.results import add_held_out, held_out_table, run, table, upstreams

    check_positive("--seeds", args.seeds)
    quiet_libraries()

    # The probes take long: what is wrong is said before.
    check_output("--output", args.output)
    seeds = range(1, args.seeds + 1)
    rows = upstreams(args.exports, args.teacher)
    held_out, without = None, None
    if args.checkpoint:
        try:
            held_out = read_held_out(args.checkpoint, Path(args.speech, "test.tsv"), args.teacher)
        except NoHeads as error:
            without = f"no held-out variance: {error}"
            print(f"note: {without}", file=sys.stderr)
    results = run(rows, args.speech, seeds, args.output)
    print(table(results, seeds))
    for task, reason in results["without"].items():
        print(f"no {task}: {reason}")
    if without:
        print(without)
    if held_out:
        entry = add_held_out(args.output, held_out, args.checkpoint, args.speech)
        print("\nshare of the held-out teacher variance explained (1 is all, 0 is none)\n")
        print(held_out_table(entry))
