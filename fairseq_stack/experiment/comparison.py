"""Trains and measures the students of a grid, and summarises the results."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError, Preempted
from fairseq_stack.experiment.grid import Grid
from fairseq_stack.experiment.measures import cannot_measure, collect, is_measured, measure_training, write_results
from fairseq_stack.experiment.summary import draw_curves, draw_loss_and_time, summary_table
from fairseq_stack.experiment.training import Terminated, train_all, trainings
from fairseq_stack.extensions import use_extensions
from fairseq_stack.files import write_whole
from fairseq_stack.teachers import load_teacher
from fairseq_stack.training.recipes import compose_recipe, subsets
from fairseq_stack.training.stored_targets import store_targets


class Comparison:
    """The trainings of a grid with one teacher and one set of speech. Finished trainings are not repeated.

    Attributes:
        planned: all Trainings.
        due: those that are not finished and measured yet.

    Args:
        grid: of the experiment.
        output: folder for all results.
        speech: folder of manifests; students are measured on test.tsv.
        teacher: file or folder of the teacher.
        fields: FIELD=VALUE for all trainings besides those of the grid.
        probes: whether to train probes on every student; needs s3prl.

    Raises:
        InputError: an input cannot be used. All are checked before the first training.
    """

    def __init__(
        self,
        grid: Grid,
        output: str | Path,
        speech: str | Path,
        teacher: str | Path,
        fields: Sequence[str] = (),
        probes: bool = False,
    ):
        if not (Path(speech) / "test.tsv").is_file():
            raise InputError(f"--speech {speech} has no test.tsv; make it with fairseq-stack prepare")
        read_manifest(Path(speech) / "test.tsv")
        self.probes = check_probes(speech) if probes else None
        self.grid, self.output, self.speech, self.teacher = grid, Path(output), speech, teacher
        self.planned = trainings(grid, output, [f"task.data={speech}", f"task.teacher={teacher}", *fields])
        self.due = [training for training in self.planned if not is_measured(training, self.probes)]
        students = {training.student: training.fields for training in self.due}  # the same with every seed
        self._configurations = {
            student: compose_recipe(grid.recipe.parent, grid.recipe.stem, own) for student, own in students.items()
        }

    def notes(self) -> list[str]:
        """Returns a sentence for each measure that a student does not have.

        Raises:
            InputError: the teacher cannot be loaded.
        """
        notes, depth = [], 0
        for student, cfg in self._configurations.items():
            use_extensions(cfg.task.extensions)
            depth = depth or load_teacher(self.teacher).depth
            notes += [f"{student}: {reason}; its cells stay empty" for reason in cannot_measure(cfg, depth)]
        return notes

    def train(self, processes: int) -> list[str]:
        """Trains and measures the due trainings.

        Args:
            processes: trainings to run at a time; they share the cores.

        Returns:
            one line for each failed training.

        Raises:
            Preempted: SIGTERM was received.
        """
        for cfg in _one_for_each_store(self._configurations.values()):  # before the trainings, which read them
            store_targets(cfg, subsets(cfg.dataset))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))  # measures while trainings run
        failed, done = [], len(self.planned) - len(self.due)
        try:
            with tqdm(total=len(self.planned), initial=done, desc="trainings", unit="") as bar:
                for training, problem in train_all(self.grid, self.due, processes):
                    try:
                        if problem is None:
                            use_extensions(self._configurations[training.student].task.extensions)
                            measure_training(training, self.speech, self.probes)
                    except InputError as error:
                        problem = str(error)
                    if problem is not None:
                        failed.append(problem)
                    bar.update()
        except Terminated:
            raise Preempted from None
        return failed

    def summarise(self, command: str) -> str | None:
        """Writes results.json, figures and summary.md. Returns the table, or None if no student is measured yet.

        Args:
            command: the command line, for results.json.
        """
        results = collect(self.grid, self.planned, command)
        if not results["students"]:
            return None
        write_results(results, self.output)
        figures = {"by_updates": draw_curves(results, "updates"), "by_time": draw_curves(results, "minutes")}
        for name, figure in {**figures, "loss_and_time": draw_loss_and_time(results)}.items():
            figure.savefig(self.output / f"{name}.png")
        table = summary_table(results)
        write_whole(self.output / "summary.md", table + "\n")
        return table


def _one_for_each_store(configurations: Iterable[DictConfig]) -> list[DictConfig]:
    """Return those that store targets, without those that store the same targets as one before."""
    found = {}
    for cfg in configurations:
        if cfg.task.get("target_store"):
            loading = subsets(cfg.dataset), cfg.dataset.combine_valid_subsets
            found.setdefault(str((cfg.task, cfg.criterion, cfg.model.share_teacher_cnn, loading)), cfg)
    return list(found.values())


def check_probes(speech: str | Path) -> str:
    """Returns the protocol_digest of the speech; raises an InputError unless probes can be trained on it."""
    try:
        import s3prl  # noqa: F401

        from fairseq_stack.evaluation.results import protocol_digest
        from fairseq_stack.evaluation.tasks import read_tasks
    except ModuleNotFoundError as error:
        raise InputError(f"--probes needs {error.name}, which is not installed; leave it out") from None
    read_tasks(speech)
    return protocol_digest(speech)
