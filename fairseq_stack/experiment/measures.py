"""Measures the trainings of an experiment: losses, variance explained, probes and time."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fairseq_stack.analysis.held_out import NoHeads, explained_by_layer, read_held_out
from fairseq_stack.analysis.intervals import percentile_interval
from fairseq_stack.analysis.objective import output_objective_of
from fairseq_stack.analysis.runs import read_run
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.criterions.layer_mapping import predicted_layers, taught_layers
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.experiment.grid import Grid
from fairseq_stack.experiment.training import MEASURED, Training
from fairseq_stack.files import write_whole

# {student: {task: {"score" or "against": (low, high)}}}
Intervals = dict[str, dict[str, dict[str, tuple[float, float] | None]]]
LOSS = "output_loss"  # does not depend on a student's intermediate loss


def cannot_measure(cfg: Any, teacher_depth: int) -> list[str]:
    """Returns a sentence for each measure that a training of this configuration does not have.

    Args:
        cfg: the composed recipe.
        teacher_depth: transformer layers of its teacher.
    """
    missing = []
    if not predicted_layers(cfg.criterion, teacher_depth):
        missing.append(f"criterion.loss={cfg.criterion.loss} has no heads, so no variance is explained")
    elif LOSSES[cfg.criterion.loss].codes:
        missing.append(f"criterion.loss={cfg.criterion.loss} predicts codes, so no variance is explained")
    if teacher_depth not in taught_layers(cfg.criterion, teacher_depth):
        missing.append(f"it does not learn the teacher's last layer ({teacher_depth}), so it has no output loss")
    elif cfg.dataset.disable_validation:
        missing.append("dataset.disable_validation=true, so it has no held-out loss")
    return missing


def is_measured(training: Training, probes: str | None = None) -> bool:
    """Returns whether a training is finished and measured.

    Args:
        training: of an experiment.
        probes: the protocol_digest of the speech if its probes must be measured too.
    """
    file = training.folder / MEASURED
    return file.exists() and (probes is None or json.loads(file.read_text()).get("probes_of") == probes)


def measure_training(training: Training, speech: str | Path, probes: str | None) -> None:
    """Measures a finished training and saves the numbers in its folder. Measures that it does not have stay empty.

    Args:
        training: finished.
        speech: folder with test.tsv and, for probes, labels.
        probes: the protocol_digest of the speech, to train the probes of fairseq-stack evaluate with one seed each.

    Raises:
        InputError: a file cannot be read.
    """
    checkpoint = training.folder / "checkpoints" / "checkpoint_last.pt"
    run = read_run(training.folder, f"{training.student} {training.seed}")
    loss = run.valid.get(LOSS)
    try:
        explained = explained_by_layer(*read_held_out(checkpoint, Path(speech) / "test.tsv"))
    except NoHeads:
        explained = {}
    student = student_from_checkpoint(load_checkpoint(checkpoint), str(checkpoint))
    probed = _probes(training, checkpoint, speech) if probes is not None else {}
    found = {
        "depth": student.depth,
        "full_depth": student.config["encoder_layers"],
        "updates": [] if loss is None else loss.updates.tolist(),
        "loss": [] if loss is None else loss.values.tolist(),
        "loss_of": output_objective_of(run.config),
        "stages": [[stage.depth, stage.begin, stage.end] for stage in run.stages],
        "seconds_per_update": run.costs,
        "explained": {str(layer): share for layer, share in explained.items()},
        "probes_of": probes,
        "probes": {task: result["test"] for task, result in probed.items()},
        "resampled": {task: result["resampled"] for task, result in probed.items()},
    }
    write_whole(training.folder / MEASURED, json.dumps(found, indent=1) + "\n")


def _probes(training, checkpoint, speech):
    """{task: PROBE} of one probe each, see evaluation.results."""
    from fairseq_stack.evaluation.results import run_probes
    from fairseq_stack.evaluation.upstreams import files_digest, load_export
    from fairseq_stack.export.student import export

    student = training.folder / "student"
    export(checkpoint, "huggingface", student, Path(speech) / "test.tsv", force=True)
    rows = {"student": (files_digest(student), lambda: load_export(student))}
    results = run_probes(rows, speech, [1], training.folder / "probes.json")
    return {task: seeds["1"] for task, seeds in results["upstreams"]["student"]["tasks"].items()}


def collect(grid: Grid, trainings: Iterable[Training], command: str) -> dict[str, Any]:
    """Returns all results of an experiment as plain values.

    The cost of an update at a depth is the median over all trainings of the student's cost group. Other processes slow
    down some trainings more than others, and the cost of a layer does not depend on its weights.

    Args:
        grid: of the experiment.
        trainings: of the grid; those that are not measured yet are left out.
        command: the command line, which is saved with the results.
    """
    found: dict[str, dict[int, Any]] = {}
    for training in filter(is_measured, trainings):
        of_student = found.setdefault(training.student, {})
        of_student[training.seed] = json.loads((training.folder / MEASURED).read_text())
    costs = {}
    for student, seeds in found.items():
        for measured in seeds.values():
            for (depth, _, _), seconds in zip(measured["stages"], measured["seconds_per_update"]):
                if seconds == seconds:  # not nan; a stage with fewer than two log entries has nan
                    costs.setdefault((grid.cost_group(student), depth), []).append(seconds)
    intervals = probe_intervals(
        {
            student: {seed: measured.pop("resampled", {}) for seed, measured in seeds.items()}
            for student, seeds in found.items()
        },
        grid.reference,
    )
    for student, seeds in found.items():
        for measured in seeds.values():
            stages = [
                (begin, end, median(costs.get((grid.cost_group(student), depth), [float("nan")])))
                for depth, begin, end in measured["stages"]
            ]
            measured["seconds"] = [_seconds(update, stages) for update in measured["updates"]]
            measured["seconds_of_all"] = _seconds(stages[-1][1], stages)
    return {
        "command": command,
        "recipe": grid.recipe.name,
        "fields": list(grid.fields),
        "reference": grid.reference,
        "environment": environment(),
        "students": {
            student: {
                "fields": list(grid.students[student]),
                "seeds": {str(seed): found[student][seed] for seed in sorted(found[student])},
                "probe_intervals": intervals[student],
            }
            for student in grid.students
            if student in found
        },
    }


def probe_intervals(resampled: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]], reference: str) -> Intervals:
    """Returns the 95 % intervals of scores of probes over test recordings, by the bootstrap.

    Args:
        resampled: {student: {seed: {task: the bootstrap of its score}}}.
        reference: a student.

    Returns:
        {student: {task: {"score": (low, high), "against": (low, high)}}}. `score` is the mean over the student's seeds.
        `against` is the mean difference from the reference, over the seeds that both have; None for the reference, and
        if there is no such seed.
    """
    found: Intervals = {}
    for student, seeds in resampled.items():
        found[student] = {}
        for task in dict.fromkeys(task for tasks in seeds.values() for task in tasks):
            having = {seed: np.array(tasks[task]) for seed, tasks in seeds.items() if task in tasks}
            of_reference = {} if student == reference else resampled.get(reference, {})
            differences = [
                scores - np.array(of_reference[seed][task])
                for seed, scores in having.items()
                if task in of_reference.get(seed, {})
            ]
            found[student][task] = {
                "score": percentile_interval(np.mean(list(having.values()), axis=0)),
                "against": percentile_interval(np.mean(differences, axis=0)) if differences else None,
            }
    return found


def _seconds(update, stages):
    """Seconds of training up to an update."""
    return sum(max(0, min(update, end) - begin) * cost for begin, end, cost in stages)


def time_to_reach(measured: dict[str, Any], loss: float) -> float | None:
    """Returns the seconds of training until the held-out loss is `loss`, interpolated between validations.

    None if it never is.
    """
    seconds, losses = measured["seconds"], measured["loss"]
    for number, value in enumerate(losses):
        if value <= loss:
            if not number:
                return seconds[0]
            return float(np.interp(-loss, [-losses[number - 1], -value], seconds[number - 1 : number + 1]))
    return None


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write_results(results: dict[str, Any], folder: str | Path) -> None:
    """Writes results.json into the experiment's folder."""
    write_whole(Path(folder) / "results.json", json.dumps(results, indent=1) + "\n", f"--output {folder}")
