"""Train a grid of students with several seeds each and compare them in one table and one set of figures.

An experiment is a file of examples/experiments. Each of its trainings runs through fairseq-hydra-train, as many at a
time as --processes says. Stopped and started again, the command goes on: what is finished is not done again.
"""

import argparse
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError, check_output, one_line_errors
from fairseq_stack.experiment.grid import read_grid
from fairseq_stack.experiment.measures import cannot_measure, collect, is_measured, measure, write_results
from fairseq_stack.experiment.summary import draw_curves, draw_loss_and_time, summary_table
from fairseq_stack.experiment.training import train, trainings
from fairseq_stack.targets.fill import store_targets
from fairseq_stack.teachers import load_teacher
from fairseq_stack.training.recipes import compose_recipe, subsets


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path, metavar="FILE", help="the experiment, such as examples/experiments/methods.yaml")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for everything that it makes")
    parser.add_argument("--speech", type=Path, required=True, metavar="DIR",
                        help="folder that scripts/prepare_speech.py made; test.tsv of it is for measuring")  # fmt: skip
    parser.add_argument("--teacher", type=Path, required=True, metavar="PATH", help="file or folder of the teacher")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N",
                        help="trainings at a time, which share the cores (default: %(default)s)")  # fmt: skip
    parser.add_argument("--probes", action="store_true", help="probe every student as scripts/evaluate.py does")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of all trainings to change")
    args = parser.parse_intermixed_args()  # the fields may stand behind the options
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: give 1 or more")
    check_output("--output", args.output, folder=True)
    if not (args.speech / "test.tsv").is_file():
        raise InputError(f"--speech {args.speech} has no test.tsv; make it with scripts/prepare_speech.py")
    read_manifest(args.speech / "test.tsv")
    # What the libraries say while they load a model is not about the experiment.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    if args.probes:
        check_probes(args.speech)

    grid = read_grid(args.grid)
    everywhere = [f"task.data={args.speech}", f"task.teacher={args.teacher}", *args.overrides]
    planned = trainings(grid, args.output, everywhere)
    due = [training for training in planned if not is_measured(training, args.probes)]
    configurations = [compose_recipe(grid.recipe.parent, grid.recipe.stem, training.fields) for training in due]
    if due:
        say_what_stays_empty(due, configurations, load_teacher(args.teacher).depth)
    for cfg in configurations:  # so that all trainings find the targets that they will ask for
        if cfg.task.get("target_store"):
            store_targets(cfg, subsets(cfg.dataset))
    torch.set_num_threads(max(1, os.cpu_count() // args.processes))  # for measuring beside the trainings
    failed = []
    with tqdm(total=len(planned), initial=len(planned) - len(due), desc="trainings", unit="") as bar:
        for training, problem in train(grid, due, args.processes):
            try:
                if problem is None:
                    measure(training, args.speech, args.probes)
            except InputError as error:
                problem = str(error)
            if problem is not None:
                failed.append(problem)
            bar.update()

    results = collect(grid, planned, shlex.join(["python", *sys.argv]))
    if results["students"]:
        write_results(results, args.output)
        figures = {"by_updates": draw_curves(results, "updates"), "by_time": draw_curves(results, "minutes")}
        for name, figure in {**figures, "loss_and_time": draw_loss_and_time(results)}.items():
            figure.savefig(args.output / f"{name}.png")
        table = summary_table(results)
        (args.output / "summary.md").write_text(table + "\n", encoding="utf-8")
        print(table)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(due)} trainings failed, first: {failed[0]}; correct it and start again, what is"
            " finished is kept"
        )


def check_probes(speech):
    """Raise an InputError unless probes can be trained on the speech."""
    try:
        import s3prl  # noqa: F401

        from fairseq_stack.evaluation.tasks import read_tasks
    except ModuleNotFoundError as error:
        raise InputError(f"--probes needs {error.name}, which is not installed; leave it out") from None
    read_tasks(speech)


def say_what_stays_empty(due, configurations, teacher_depth):
    """Print a line for each student of which something cannot be measured, before anything is trained."""
    missing = {training.student: cannot_measure(cfg, teacher_depth) for training, cfg in zip(due, configurations)}
    for student, reasons in missing.items():
        for reason in reasons:
            print(f"note: {student}: {reason}; its cells stay empty", file=sys.stderr)


if __name__ == "__main__":
    main()
