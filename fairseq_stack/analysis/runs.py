"""One training as the report sees it: its scalars, stages, costs, growths and configuration."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from fairseq_stack.analysis.objective import objective_of, output_objective_of
from fairseq_stack.analysis.scalars import Series, read_scalars
from fairseq_stack.analysis.stages import Stage, dearer_stages, find_stages, seconds_per_update
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.growth.growth_similarity import GrowthSimilarity, read_growths

# What the configuration in a checkpoint says about a distillation; the rest is fairseq's for other jobs.
CONFIG_GROUPS = (
    "task", "model", "criterion", "optimization", "optimizer", "lr_scheduler", "dataset", "common", "checkpoint",
    "distributed_training", "ema",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        name: what to call it.
        train: {name: Series} of the training.
        valid: the same of the validation, on the first of several subsets; may be empty.
        stages: its stages.
        costs: median seconds of an update in each stage, nan where unknown.
        growths: the similarity of the layers around each growth; may be empty.
        config: the resolved configuration, or None where neither a checkpoint nor hydra kept it.
    """

    name: str
    train: dict[str, Series]
    valid: dict[str, Series]
    stages: list[Stage]
    costs: list[float]
    growths: list[GrowthSimilarity]
    config: dict | None

    @property
    def updates(self):
        return self.stages[-1].end

    @property
    def seconds(self):
        """Of training at the median times: without validation, growth and pauses; nan where a stage's is unknown."""
        return sum(cost * stage.updates for cost, stage in zip(self.costs, self.stages))

    @property
    def block(self):
        """Layers that one layer of the first stage has become in an interleaved student; None for others."""
        model = (self.config or {}).get("model") or {}
        return model.get("stack_stages") if model.get("stack_method") == "interleaved" else None

    @property
    def objective(self):
        """What its loss depends on; see objective_of."""
        return objective_of(self.config)

    @property
    def output_objective(self):
        """What the loss of the teacher's last layer depends on; see objective_of."""
        return output_objective_of(self.config)

    @property
    def steady(self):
        """Whether no stage's updates took longer than those of a deeper one, so that times can be compared."""
        return not dearer_stages(self.stages, self.costs)

    def hours(self, series):
        """[E] hours of wall-clock time until each entry of a Series of this run.

        Counts loading, validation and checkpoints; neither the time between two starts nor what a
        resumed run did for the second time.
        """
        wall = self.train["wall"]  # fairseq's seconds since the start of the process
        firsts = [int(np.argmax(wall.starts == start)) for start in np.unique(wall.starts)]
        begins = wall.clock[firsts] - wall.values[firsts]
        lasts = [*(first - 1 for first in firsts[1:]), len(wall.clock) - 1]
        spent = np.cumsum([0.0, *(wall.clock[last] - begin for last, begin in zip(lasts, begins))])
        start = np.maximum(np.searchsorted(begins, series.clock, side="right") - 1, 0)
        return (spent[start] + series.clock - begins[start]) / 3600


def read_runs(folders, reference=None):
    """Read several trainings and the one to compare them with, which may be one of them.

    They go by the names of their folders, or, where two have the same, by their paths.

    Returns:
        a list of Run, and the Run of `reference` or None.

    Raises:
        InputError: as `read_run`.
    """
    paths = [Path(folder).resolve() for folder in folders]
    paths = list(dict.fromkeys([*paths, *([Path(reference).resolve()] if reference else [])]))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    runs = {path: read_run(path, name) for path, name in zip(paths, names)}
    return list(runs.values()), runs[Path(reference).resolve()] if reference else None


def read_run(folder, name):
    """Read the folder of a training, with tensorboard/ and, for what they hold, checkpoints/ or .hydra/ in it.

    Args:
        folder: where it is.
        name: what to call it.

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


def read_config(folder):
    """The resolved configuration of a run as plain values: from its last checkpoint, or else as hydra wrote it.

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
