"""Train the students of a grid, each by fairseq-hydra-train in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import fairseq_stack
from fairseq_stack.errors import InputError
from fairseq_stack.files import write_whole

FIELDS = "fields.json"
MEASURED = "measured.json"


class Terminated(BaseException):
    """SIGTERM has come while trainings run; no handler of errors is to take it for one."""


@dataclass(frozen=True)
class Training:
    """One student with one seed.

    Attributes:
        student: its name in the grid.
        seed: of its initialisation, crops and order.
        folder: where it keeps checkpoints/, tensorboard/, train.log, what made it (FIELDS) and, once it is finished,
            what came of it (MEASURED).
        fields: what it changes of the recipe.
    """

    student: str
    seed: int
    folder: Path
    fields: Tuple[str, ...]

    def command(self, recipe):
        """The command that trains it, or goes on where it was."""
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

    def keep_fields(self, recipe):
        """Write down what makes it."""
        write_whole(self.folder / FIELDS, json.dumps([recipe.name, *self.fields], indent=1) + "\n")


def trainings(grid, folder, fields=()):
    """All trainings of a grid, seed by seed, so that an experiment cut short compares all students with fewer seeds.

    Args:
        grid: a Grid.
        folder: of the experiment.
        fields: what all of them change besides what the grid says, such as task.data.

    Raises:
        InputError: a training is there that was made with other fields.
    """
    made = []
    for seed in grid.seeds:
        for student, own in grid.students.items():
            place = Path(folder) / "runs" / student / str(seed)
            training = Training(student, seed, place, (*grid.fields, *own, *fields))
            known = place / FIELDS
            if known.exists() and json.loads(known.read_text()) != [grid.recipe.name, *training.fields]:
                raise InputError(f"{place} was made with other fields; give another --output, or remove that folder")
            made.append(training)
    return made


def train(grid, due, processes):
    """Run trainings, several at a time, each with its share of the cores; yields each when it has ended.

    Args:
        grid: a Grid.
        due: list of Training.
        processes: how many to run at a time.

    Yields:
        a Training, and None if it has finished or the reason why it has not.

    Raises:
        Terminated: SIGTERM has come. The trainings that run are told to end, too.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    running = []

    def run(training):
        training.folder.mkdir(parents=True, exist_ok=True)
        training.keep_fields(grid.recipe)
        with open(training.folder / "output.log", "a", encoding="utf-8") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                training.command(grid.recipe), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            running.append(process)
            return process.wait()

    # A job that is ended takes its trainings along; they save a checkpoint.
    before = signal.signal(signal.SIGTERM, _end)
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
        signal.signal(signal.SIGTERM, before)


def _end(number, frame):
    raise Terminated


def _reason(log):
    """What a training that failed has said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return f"{log} ends with {next((line.strip() for line in reversed(lines) if line.strip()), 'nothing')[:500]!r}"
