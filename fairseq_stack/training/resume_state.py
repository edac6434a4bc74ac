"""Checks whether optimizer, schedule and position in the epoch of a checkpoint fit this configuration."""

import zlib
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
from fairseq.data.iterators import EpochBatchIterator
from omegaconf import OmegaConf

from fairseq_stack.errors import InputError

_SAME = {"adamw": "adam"}  # their states are the same
_PRECISION = ("common.fp16", "common.bf16", "common.amp")
# These fields have no effect in fp32 and with AMP.
_HALF = ("common.memory_efficient_fp16", "common.memory_efficient_bf16", "common.fp16_no_flatten_grads")


def check_optimizer(saved: Any, cfg: Any, path: str, reset_optimizer: bool, reset_lr_scheduler: bool) -> None:
    """Raise an InputError if a checkpoint has the state of another class of optimizer or schedule.

    Args:
        saved: the configuration in the checkpoint, or None if it has none.
        cfg: this run's configuration.
        path: the path of the checkpoint, for the message.
        reset_optimizer, reset_lr_scheduler: whether this run ignores their state.
    """
    if saved is None or reset_optimizer:
        return
    saved, cfg = plain_configuration(saved), plain_configuration(cfg)
    half = _value(cfg, "common.fp16") or _value(cfg, "common.bf16")
    fields = ["optimizer._name", "optimization.use_bmuf", *_PRECISION, *(_HALF if half else ())]
    resets = dict.fromkeys(
        fields, "checkpoint.reset_optimizer=true, which keeps only the weights and starts at update 0"
    )
    if not reset_lr_scheduler:
        resets["lr_scheduler._name"] = "checkpoint.reset_lr_scheduler=true"
    for field, reset in resets.items():
        before, now = (_value(each, field) for each in (saved, cfg))
        differs = _SAME.get(before, before) != _SAME.get(now, now)
        if before is not None and differs:  # an older version may lack the field
            before, now = _text(before), _text(now)
            raise InputError(
                f"{field}={now} does not fit the state in {path}, which was saved with {field}={before}; set"
                f" {field}={before}, or for this start {reset}"
            )


def _value(cfg: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field `group.name`, or None if the configuration lacks it."""
    group, name = field.split(".")
    return (cfg.get(group) or {}).get(name)


def plain_configuration(cfg: Any) -> dict[str, Any]:
    """Return fairseq's configuration as plain values.

    The older command line keeps the fields of some optimizers and schedules in a namespace. Safe loading refuses a
    namespace in a checkpoint.
    """
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    sections: Mapping[str, Any] = cfg
    return {group: vars(section) if isinstance(section, Namespace) else section for group, section in sections.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def epoch_layout(iterator: EpochBatchIterator) -> dict[str, int]:
    """Return the numbers of batches and processes, the seed, and a checksum of the recordings in each batch.

    A position in an epoch has the same meaning only in the same layout.
    """
    batches = [np.asarray(batch, dtype=np.int64) for batch in iterator.frozen_batches]
    contents = [np.array([len(batch) for batch in batches]), *batches, getattr(iterator.dataset, "sizes", ())]
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(np.ascontiguousarray(content, dtype=np.int64).data, checksum)
    return {"batches": len(batches), "processes": iterator.num_shards, "seed": iterator.seed, "checksum": checksum}


def next_epoch(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an EpochBatchIterator at the start of the epoch after that in `state`."""
    return {**state, "epoch": state["epoch"] + 1, "iterations_in_epoch": 0}


def layout_change(saved: dict[str, int] | None, now: dict[str, int]) -> str:
    """Return how two layouts of an epoch differ, as text."""
    if saved and (saved["batches"], saved["processes"]) != (now["batches"], now["processes"]):
        before, after = (f"{each['batches']} batches (processes: {each['processes']})" for each in (saved, now))
        return f"had {before} and has {after} now"
    return "has other batches than when the checkpoint was saved"
