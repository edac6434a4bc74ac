"""Collect results of s3prl's SUPERB problems into one table, beside published ones."""

import argparse
import sys
from pathlib import Path

from fairseq_stack.analysis.report import markdown_table
from fairseq_stack.errors import one_line_errors
from fairseq_stack.evaluation.superb import COLUMNS, best_runs, find_runs, scores
from fairseq_stack.evaluation.superb_published import PUBLISHED


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="one for each model, named like it, with the --target_dir folders of all problems and learning rates",
    )
    arguments = parser.parse_args()

    rows = []
    for folder in arguments.folders:
        chosen = best_runs(find_runs(folder))
        for run in chosen:
            state = "" if run.test else "; not tested yet"
            fold = f", {run.fold}" if run.fold else ""
            print(f"{run.folder}: {run.problem}{fold}, learning rate {run.learning_rate:g} is best on dev{state}",
                  file=sys.stderr)
        rows.append((folder.resolve().name, scores(chosen)))
    rows += PUBLISHED
    columns = [column for column in COLUMNS if any(column in found for _, found in rows)]
    print(markdown_table(
        ["model", *columns],
        [[name, *(f"{found[column]:.2f}" if column in found else "" for column in columns)] for name, found in rows],
    ))


if __name__ == "__main__":
    main()
