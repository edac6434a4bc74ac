"""Collect results of s3prl's SUPERB problems in one table with published results."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="folder of a model, with its name, that has the --target_dir folders of all problems and learning rates",
    )  # fmt: skip


def run(args: Namespace) -> None:
    import sys

    from fairseq_stack.evaluation.superb import COLUMNS, best_runs, find_runs, scores
    from fairseq_stack.evaluation.superb_published import PUBLISHED
    from fairseq_stack.tables import markdown_table

    rows = []
    for folder in args.folders:
        chosen = best_runs(find_runs(folder))
        for one in chosen:
            state = "" if one.test else "; not tested yet"
            fold = f", {one.fold}" if one.fold else ""
            print(f"{one.folder}: {one.problem}{fold}, learning rate {one.learning_rate:g} is best on dev{state}",
                  file=sys.stderr)  # fmt: skip
        rows.append((folder.resolve().name, scores(chosen)))
    rows += PUBLISHED
    columns = [column for column in COLUMNS if any(column in found for _, found in rows)]
    cells = [[name, *(f"{found[column]:.2f}" if column in found else "" for column in columns)] for name, found in rows]
    print(markdown_table(["model", *columns], cells))
