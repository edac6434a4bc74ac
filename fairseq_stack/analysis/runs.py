"""A training for the report: its scalars, stages, costs, growths and configuration."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fairseq_stack.analysis.objective import objective_of, output_objective_of
from fairseq_stack.analysis.scalars import Series, read_scalars
from fairseq_stack.analysis.stages import Stage, find_stages, seconds_per_update, slowed_stages
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.growth.growth_similarity import GrowthSimilarity, read_growths

# The groups of a checkpoint's configuration that a distillation uses.
CONFIG_GROUPS = (
    "task", "model", "criterion", "optimization", "optimizer", "lr_scheduler", "dataset", "common", "checkpoint",
    "distributed_training", "ema",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        name: shown in the report.
        train: {name: Series} of the training.
        valid: the same of the validation, on the first of several subsets; may be empty.
        stages: its stages.
        costs: median seconds of an update in each stage, nan where unknown.
        growths: the similarity of the layers before and after each growth; may be empty.
        config: the resolved configuration, or None if neither a checkpoint nor hydra saved it.
    """

    name: str
    train: dict[str, Series]
    valid: dict[str, Series]
    stages: list[Stage]
    costs: list[float]
    growths: list[GrowthSimilarity]
    config: dict[str, Any] | None

    @property
    def updates(self) -> int:
        """Updates of the whole training."""
        return self.stages[-1].end

    @property
    def seconds(self) -> float:
        """Seconds of all updates at the median times, without validation, growth and pauses; nan if one is unknown."""
        return sum(cost * stage.updates for cost, stage in zip(self.costs, self.stages))

    @property
    def block(self) -> int | None:
        """Number of copies of each layer of the first stage in an interleaved student; None for other students."""
        model = (self.config or {}).get("model") or {}
        return model.get("stack_stages") if model.get("stack_method") == "interleaved" else None

    @property
    def objective(self) -> dict[str, Any] | None:
        """See objective_of."""
        return objective_of(self.config)

    @property
    def output_objective(self) -> dict[str, Any] | None:
        """See output_objective_of."""
        return output_objective_of(self.config)

    @property
    def reliable_times(self) -> bool:
        """Whether no stage was slowed down by other processes; see slowed_stages."""
        return not slowed_stages(self.stages, self.costs)

    def hours(self, series: Series) -> np.ndarray:
        """Returns the hours [E] of wall-clock time until each entry of a Series of this run.

        They include loading, validation and checkpoints. They exclude the time between two starts and updates that
        were lost and repeated after a resume.
        """
        wall = self.train["wall"]  # fairseq's seconds since the start of the process
        firsts = [int(np.argmax(wall.starts == start)) for start in np.unique(wall.starts)]
        begins = wall.clock[firsts] - wall.values[firsts]
        lasts = [*(first - 1 for first in firsts[1:]), len(wall.clock) - 1]
        spent = np.cumsum([0.0, *(wall.clock[last] - begin for last, begin in zip(lasts, begins))])
        start = np.maximum(np.searchsorted(begins, series.clock, side="right") - 1, 0)
        return (spent[start] + series.clock - begins[start]) / 3600


def read_runs(folders: Sequence[str | Path], reference: str | Path | None = None) -> tuple[list[Run], Run | None]:
    """Reads trainings and the reference to compare them with, which may be one of them.

    A run has the name of its folder. If two folders have the same name, all runs are named by their paths.

    Returns:
        the runs, the reference among them, and the Run of `reference` or None.

    Raises:
        InputError: as `read_run`.
    """
    given = [Path(folder).resolve() for folder in (*folders, *([reference] if reference else []))]
    paths: list[Path] = list(dict.fromkeys(given))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    runs = {path: read_run(path, name) for path, name in zip(paths, names)}
    return list(runs.values()), runs[Path(reference).resolve()] if reference else None


def read_run(folder: str | Path, name: str) -> Run:
    """Reads a training from its folder.

    Args:
        folder: has tensorboard/ and, for the growths and the configuration, checkpoints/ or .hydra/.
        name: of the Run.

    Raises:
        InputError: the scalars are missing or not those of a distillation, or a file is damaged.
    """
    folder = Path(folder)
    train = read_scalars(folder / "tensorboard" / "train_inner")
    for scalar in ("loss", "stage", "depth", "wall"):
        if scalar not in train:
            raise InputError(
                f"{folder / 'tensorboard'} has no scalar {scalar!r}; give a training of speech_distillation"
            )
    config = read_config(folder)
    subsets = str(((config or {}).get("dataset") or {}).get("valid_subset") or "valid").split(",")
    folders = [folder / "tensorboard" / subset for subset in subsets]
    valids = [read_scalars(each) for each in folders if each.is_dir()]
    valids = [scalars for scalars in valids if "loss" in scalars]
    last_update = max(int(scalars["loss"].updates[-1]) for scalars in (train, *valids))
    stages = find_stages(train["stage"], train["depth"], last_update)
    costs = seconds_per_update(stages, train["loss"], [scalars["loss"] for scalars in valids])
    growths = read_growths(folder / "checkpoints")
    return Run(name, train, valids[0] if valids else {}, stages, costs, growths, config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Returns the resolved configuration of a run as plain values, or None if the run saved none.

    It is read from the last checkpoint, or else from hydra's file.

    Raises:
        InputError: the file is damaged.
    """
    checkpoint, hydra = folder / "checkpoints" / "checkpoint_last.pt", folder / ".hydra" / "config.yaml"
    if checkpoint.is_file():
        config = load_checkpoint(checkpoint, header_only=True).get("cfg") or {}
        return {
            group: {name: value for name, value in config[group].items() if value is not None}
            for group in CONFIG_GROUPS
            if isinstance(config.get(group), dict)
        }
    if not hydra.is_file():
        return None
    try:
        config = yaml.safe_load(hydra.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{hydra} cannot be read as YAML; remove it") from error
    if not isinstance(config, dict):
        raise InputError(f"{hydra} is no configuration; remove it")
    return config
