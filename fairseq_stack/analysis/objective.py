"""The objective of a run: what its loss depends on. Losses can be compared only between equal objectives."""

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_stack.criterions.losses import fields_of
from fairseq_stack.targets.formats import codebook_shape

# Used for a run that saved only hydra's configuration, which has only the fields that its recipe names.
DEFAULTS = {
    "criterion": {
        "loss": "mse",
        "cosine_weight": 1.0,
        "target_normalization": "none",
        "teacher_layers": [4, 8, 12],
        "intermediate_weight": 0.5,
        "output_weight": 1.0,
        "unmasked_weight": 1.0,
    },
    "task": {
        "whisper_pad": False,
        "max_sample_size": 250_000,
        "mask_prob": 0.0,
        "mask_length": 10,
        "target_store": None,
        "target_format": "fp16",
    },
    "dataset": {"valid_subset": "valid"},
}


def objective_of(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the fields that the whole loss depends on, as {field: value}; None if the configuration lacks them.

    The student layers that predict (criterion.intermediate_style) are not part of the objective.

    Args:
        config: the resolved configuration of a run, or None.
    """
    output = output_objective_of(config)
    if config is None or output is None:
        return None
    criterion, task = _group(config, "criterion"), _group(config, "task")
    found = {**output, "criterion.output_weight": float(criterion["output_weight"])}
    weight = float(criterion["intermediate_weight"]) if criterion["teacher_layers"] else 0.0
    found["criterion.intermediate_weight"] = weight
    if weight:
        found["criterion.teacher_layers"] = sorted(set(criterion["teacher_layers"]))
    if task["mask_prob"]:
        found.update({f"task.{name}": task[name] for name in ("mask_prob", "mask_length")})
        found["criterion.unmasked_weight"] = float(criterion["unmasked_weight"])
    return found


def output_objective_of(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the fields that the loss of the teacher's last layer depends on; see objective_of."""
    if config is None or not all(isinstance(config.get(group), dict) for group in ("criterion", "task")):
        return None
    criterion, task, dataset = (_group(config, group) for group in ("criterion", "task", "dataset"))
    if not isinstance(task.get("teacher"), str) or not isinstance(task.get("data"), str):
        return None
    found = {f"criterion.{name}": criterion[name] for name in ("loss", "target_normalization")}
    found.update({f"criterion.{name}": criterion.get(name) for name in fields_of(criterion["loss"])})
    if task["target_store"] and codebook_shape(task["target_format"]):
        # fp16 and int8 change a loss by less than a thousandth; codes have less variance, and are other targets.
        found["task.target_format"] = task["target_format"]
    return {
        **found,
        "task.teacher": os.path.realpath(task["teacher"]),
        "task.whisper_pad": task["whisper_pad"],
        "task.max_sample_size": task["max_sample_size"],
        "task.data": os.path.realpath(task["data"]),
        "dataset.valid_subset": dataset["valid_subset"],
    }


def batch_of(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the fields that set the speech of an update, as {field: value}; None if the configuration lacks them.

    A field that is not set has the value None.

    Args:
        config: the resolved configuration of a run, or None.
    """
    groups = ("dataset", "optimization", "task")
    if config is None or not all(isinstance(config.get(group), dict) for group in groups):
        return None
    dataset, optimization, _ = (config[group] for group in groups)
    processes = (config.get("distributed_training") or {}).get("distributed_world_size") or 1
    return {
        "dataset.batch_size": dataset.get("batch_size"),
        "dataset.max_tokens": dataset.get("max_tokens"),
        "optimization.update_freq": optimization.get("update_freq") or [1],
        "distributed_training.distributed_world_size": processes,
        "task.max_sample_size": _group(config, "task")["max_sample_size"],
    }


def _group(config, name):
    given = config.get(name)
    return {**DEFAULTS[name], **(given if isinstance(given, dict) else {})}


@dataclass(frozen=True)
class Kind:
    """Runs whose losses can be compared.

    Attributes:
        letter: its name: A, B, ...; "" if all runs are of one kind.
        members: positions of its runs in the list that `kinds_of` was given.
        fields: {field: value}, where it differs from other known kinds; None if its configuration is unknown.
    """

    letter: str
    members: list[int]
    fields: dict[str, Any] | None

    def __str__(self) -> str:
        """Its fields as text."""
        if self.fields is None:
            return "unknown, because the configuration was not kept"
        return ", ".join(f"{name}={value}" for name, value in self.fields.items())


def describe_kinds(kinds: Sequence[Kind], names: Sequence[str]) -> str:
    """Returns text such as "A is full, grown (criterion.loss=mse); B is star (criterion.loss=temporal_gram)".

    Args:
        kinds: from `kinds_of`.
        names: of the runs, in the order that `kinds_of` was given.
    """
    texts = []
    for kind in kinds:
        fields = f" ({kind})" if str(kind) else ""
        texts.append(f"{kind.letter} is {', '.join(names[member] for member in kind.members)}{fields}")
    return "; ".join(texts)


def kinds_of(objectives: Sequence[dict[str, Any] | None]) -> list[Kind]:
    """Groups runs of the same objective.

    Args:
        objectives: from `objective_of`, one per run.

    Returns:
        a Kind per group, in the order of their first runs.
    """
    found = []
    for objective in objectives:
        if objective not in found:
            found.append(objective)
    known = [objective for objective in found if objective is not None]
    names = list(dict.fromkeys(name for objective in known for name in objective))
    differ = [name for name in names if any(objective.get(name) != known[0].get(name) for objective in known)]
    return [
        Kind(
            string.ascii_uppercase[number % 26] * (number // 26 + 1) if len(found) > 1 else "",
            [position for position, other in enumerate(objectives) if other == objective],
            None if objective is None else {name: objective[name] for name in differ if name in objective},
        )
        for number, objective in enumerate(found)
    ]
