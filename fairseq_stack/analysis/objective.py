"""What a run's loss measures. Losses of two runs can be compared only where this is the same."""

import os
import string
from dataclasses import dataclass

from fairseq_stack.criterions.losses import fields_of

# Of the fields below; a run that kept hydra's configuration alone lacks those that its recipe does not name.
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
    "task": {"whisper_pad": False, "max_sample_size": 250_000, "mask_prob": 0.0, "mask_length": 10},
    "dataset": {"valid_subset": "valid"},
}


def objective_of(config):
    """What the whole loss depends on, as {field: value}; None if the configuration does not say it.

    Where in the student a prediction comes from (criterion.intermediate_style) is not part of it.

    Args:
        config: the resolved configuration of a run, or None.
    """
    output = output_objective_of(config)
    if output is None:
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


def output_objective_of(config):
    """What the loss of the teacher's last layer depends on; see objective_of."""
    if not isinstance((config or {}).get("criterion"), dict) or not isinstance(config.get("task"), dict):
        return None
    criterion, task, dataset = (_group(config, group) for group in ("criterion", "task", "dataset"))
    if not isinstance(task.get("teacher"), str) or not isinstance(task.get("data"), str):
        return None
    found = {f"criterion.{name}": criterion[name] for name in ("loss", "target_normalization")}
    found.update({f"criterion.{name}": criterion.get(name) for name in fields_of(criterion["loss"])})
    return {
        **found,
        "task.teacher": os.path.realpath(task["teacher"]),
        "task.whisper_pad": task["whisper_pad"],
        "task.max_sample_size": task["max_sample_size"],
        "task.data": os.path.realpath(task["data"]),
        "dataset.valid_subset": dataset["valid_subset"],
    }


def batch_of(config):
    """What an update holds, as {field: value} with None for what is not set; None if the configuration does not say it.

    Args:
        config: the resolved configuration of a run, or None.
    """
    groups = ("dataset", "optimization", "task")
    if not all(isinstance((config or {}).get(group), dict) for group in groups):
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
        letter: what to call it: A, B, ...; "" where all runs are of one kind.
        members: positions of its runs in the list that was sorted.
        fields: {field: value}, in what it differs from other known kinds; None where a configuration is not known.
    """

    letter: str
    members: list
    fields: dict

    def __str__(self):
        """What makes it another kind, for a sentence."""
        if self.fields is None:
            return "unknown, because the configuration was not kept"
        return ", ".join(f"{name}={value}" for name, value in self.fields.items())


def sentence(kinds, names):
    """What the kinds are, as "A is full, grown (criterion.loss=mse); B is star (criterion.loss=temporal_gram)".

    Args:
        kinds: list of Kind.
        names: of the runs, in the order that was sorted.
    """
    texts = []
    for kind in kinds:
        fields = f" ({kind})" if str(kind) else ""
        texts.append(f"{kind.letter} is {', '.join(names[member] for member in kind.members)}{fields}")
    return "; ".join(texts)


def kinds_of(objectives):
    """Sort runs by their objectives, as `objective_of` returns them; a list of Kind in the order of the first runs."""
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
