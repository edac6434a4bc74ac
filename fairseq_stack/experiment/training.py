"""Trains the students of a grid, each by fairseq-hydra-train in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import fairseq_stack
from fairseq_stack.errors import InputError
from fairseq_stack.experiment.grid import Grid
from fairseq_stack.files import write_whole

FIELDS = "fields.json"
MEASURED = "measured.json"


class Terminated(BaseException):
    """SIGTERM was received while trainings run. It is no Exception, so that no error handler catches it."""


@dataclass(frozen=True)
class Training:
    """One student with one seed.

    Attributes:
        student: its name in the grid.
        seed: of its initialisation, crops and order.
        folder: holds checkpoints/, tensorboard/, train.log, the recipe and its fields (FIELDS) and, after it is
            finished, its results (MEASURED).
        fields: FIELD=VALUE that it changes in the recipe.
    """

    student: str
    seed: int
    folder: Path
    fields: tuple[str, ...]

    def command(self, recipe: Path) -> list[str]:
        """Returns the command that starts or resumes it."""
        return [
            sys.executable,
            "-c",
            "from fairseq_cli.hydra_train import cli_main; cli_main()",
            f"--config-dir={recipe.parent}",
            f"--config-name={recipe.stem}",
            f"common.user_dir={Path(fairseq_stack.__file__).parent}",
            f"common.seed={self.seed}",
            f"common.tensorboard_logdir={self.folder / 'tensorboard'}",
            f"checkpoint.save_dir={self.folder / 'checkpoints'}",
            f"hydra.output_subdir={self.folder / '.hydra'}",
            f"hydra.job_logging.handlers.file.filename={self.folder / 'train.log'}",
            *self.fields,
        ]

    def write_fields(self, recipe: Path) -> None:
        """Writes the recipe and the fields to its folder."""
        write_whole(self.folder / FIELDS, json.dumps([recipe.name, *self.fields], indent=1) + "\n")


def trainings(grid: Grid, folder: str | Path, fields: Sequence[str] = ()) -> list[Training]:
    """Returns all trainings of a grid, ordered by seed.

    In this order, an experiment that is stopped early compares all students with fewer seeds.

    Args:
        grid: of the experiment.
        folder: of the experiment.
        fields: FIELD=VALUE for all trainings besides those of the grid, such as task.data.

    Raises:
        InputError: a training in the folder was made with other fields.
    """
    planned = []
    for seed in grid.seeds:
        for student, own in grid.students.items():
            place = Path(folder) / "runs" / student / str(seed)
            training = Training(student, seed, place, (*grid.fields, *own, *fields))
            known = place / FIELDS
            if known.exists() and json.loads(known.read_text()) != [grid.recipe.name, *training.fields]:
                raise InputError(f"{place} was made with other fields; give another --output, or remove that folder")
            planned.append(training)
    return planned


def train_all(grid: Grid, due: Sequence[Training], processes: int) -> Iterator[tuple[Training, str | None]]:
    """Runs trainings, several at a time, which share the cores. Yields each when it has ended.

    Args:
        grid: of the experiment.
        due: the trainings to run.
        processes: trainings to run at a time.

    Yields:
        a Training, and None if it has finished or the reason why it has failed.

    Raises:
        Terminated: SIGTERM was received. SIGTERM is sent to the running trainings, too.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    running = []

    def run(training):
        training.folder.mkdir(parents=True, exist_ok=True)
        training.write_fields(grid.recipe)
        with open(training.folder / "output.log", "a", encoding="utf-8") as output:
            # Threads that wait for each other give up their core sooner than by default (docs/training.md).
            waiting = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}
            environment = {**os.environ, **waiting, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                training.command(grid.recipe), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            running.append(process)
            return process.wait()

    # If the job is stopped, its trainings are stopped too; they save a checkpoint.
    previous = signal.signal(signal.SIGTERM, _end)
    pool = ThreadPoolExecutor(processes)
    try:
        started = {pool.submit(run, training): training for training in due}
        for future in as_completed(started):
            training = started[future]
            yield training, _reason(training.folder / "output.log") if future.result() else None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            if process.poll() is None:
                process.terminate()
        signal.signal(signal.SIGTERM, previous)


def _end(number, frame):
    raise Terminated


def _reason(log):
    """The last line of a failed training's log."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return f"{log} ends with {next((line.strip() for line in reversed(lines) if line.strip()), 'nothing')[:500]!r}"
