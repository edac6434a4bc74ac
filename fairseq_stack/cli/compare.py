"""Train students with several seeds each and compare them in a table and figures.

An experiment is a file such as those in examples/experiments. fairseq-hydra-train runs
each of its trainings, --processes of them at a time. After an interruption the same
command resumes: finished trainings are not repeated.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_stack.errors import check_output, check_positive


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "experiment",
        metavar="FILE",
        help="path of an experiment, or its name in the package's examples, such as methods",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder for all trainings and results"
    )
    parser.add_argument(
        "--speech", type=Path, required=True, metavar="FOLDER",
        help="folder that fairseq-stack prepare made; its test.tsv is the speech to measure on",
    )  # fmt: skip
    parser.add_argument("--teacher", type=Path, required=True, metavar="PATH", help="file or folder of the teacher")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), metavar="N",
        help="trainings that run at the same time and share the cores (default: one for each core)",
    )  # fmt: skip
    parser.add_argument("--probes", action="store_true", help="probe every student as fairseq-stack evaluate does")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of all trainings to change")


def run(args: Namespace) -> str | None:
    import logging
    import sys

    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.experiment.comparison import Comparison
    from fairseq_stack.experiment.grid import read_grid
    from fairseq_stack.training.recipes import find_recipe

    check_positive("--processes", args.processes)
    check_output("--output", args.output, folder=True)
    logging.disable(logging.WARNING)
    grid = read_grid(find_recipe(args.experiment))
    comparison = Comparison(grid, args.output, args.speech, args.teacher, args.overrides, args.probes)
    for note in comparison.notes():
        print(f"note: {note}", file=sys.stderr)
    failed = comparison.train(args.processes)
    table = comparison.summarise(args.command_line)
    if table:
        print(table)
    if failed:
        return (
            f"error: {len(failed)} of {len(comparison.due)} trainings failed, first: {failed[0]}; correct it and start"
            " again, finished trainings are kept"
        )
    return None
