"""Checks a configuration before anything is loaded.

For these mistakes fairseq would show a traceback, fail late, or not fail at all. Every check works on the whole
configuration that fairseq composes for any task. Checks of fields that the installed fairseq lacks are skipped.
"""

import ast
import difflib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from omegaconf import DictConfig, OmegaConf

from fairseq_stack.errors import InputError

# The smallest and the largest value of each number.
_RANGES = {
    "common.seed": (0, 2**31),  # fairseq adds updates and epochs to it, and numpy's seeds have 32 bits
    "common.log_interval": (1, math.inf),
    "common.fp16_init_scale": (1, math.inf),
    "common.amp_init_scale": (1, math.inf),
    "common.amp_scale_window": (1, math.inf),
    "common.model_parallel_size": (1, 1),
    "distributed_training.distributed_world_size": (1, math.inf),
    "dataset.num_workers": (0, math.inf),
    "dataset.data_buffer_size": (0, math.inf),
    "dataset.batch_size": (1, math.inf),
    "dataset.batch_size_valid": (1, math.inf),
    "dataset.max_tokens": (1, math.inf),
    "dataset.max_tokens_valid": (1, math.inf),
    "dataset.required_batch_size_multiple": (1, math.inf),
    "dataset.validate_interval": (1, math.inf),
    "dataset.max_valid_steps": (0, math.inf),
    "optimization.clip_norm": (0, math.inf),
    "optimization.max_epoch": (0, math.inf),
    "checkpoint.save_interval": (1, math.inf),
    "bmuf.global_sync_iter": (1, math.inf),
    "ema.ema_decay": (0, 1),
    "ema.ema_update_freq": (1, math.inf),
}
# Lists of numbers, and the smallest value of each number.
_LISTS = {"optimization.lr": 0, "optimization.update_freq": 1}
# Values of fields that need a package, which this package does not install.
_NEEDS = {
    ("checkpoint.write_checkpoints_asynchronously", True): "iopath",
    ("distributed_training.ddp_backend", "slowmo"): "fairscale",
    ("common.tpu", True): "torch_xla",
}
# Fields that can shard the parameters, which growth does not support, and the supported values.
_UNSHARDED = {
    "distributed_training.ddp_backend": ("c10d", "pytorch_ddp", "legacy_ddp", "no_c10d", "slowmo"),
    "distributed_training.zero_sharding": ("none",),
    "distributed_training.cpu_offload": (False,),
    "distributed_training.pipeline_model_parallel": (False,),
}
_PRECISIONS = ("common.fp16", "common.bf16", "common.amp")


def check_names(cfg: DictConfig) -> None:
    """Raise an InputError if a group of the configuration has no `_name`, or one that fairseq does not know.

    Call it before fairseq adds the defaults to the groups.
    """
    known = {
        "task": TASK_REGISTRY,
        "model": {**ARCH_MODEL_REGISTRY, **MODEL_REGISTRY},
        **{group: REGISTRIES[group]["registry"] for group in ("criterion", "optimizer", "lr_scheduler")},
    }
    for group, names in known.items():
        chosen = cfg.get(group)
        if chosen is not None and not isinstance(chosen, DictConfig):
            continue  # from the older command line, which has checked it
        name = chosen and chosen.get("_name")
        if name not in names:
            similar = ", ".join(difflib.get_close_matches(str(name), names, n=5, cutoff=0))
            raise InputError(f"{group}._name={name} is unknown; the most similar names are {similar}")


def check_configuration(cfg: DictConfig) -> None:
    """Raise an InputError for a configuration with which a training cannot start, or cannot succeed."""

    def value(field: str) -> Any:
        return OmegaConf.select(cfg, field)

    for group, typed in FairseqConfig.__dataclass_fields__.items():
        known = getattr(typed.type, "__dataclass_fields__", {})
        for name in cfg.get(group) or () if known else ():
            if name not in known:
                similar = ", ".join(difflib.get_close_matches(str(name), known, n=5, cutoff=0))
                raise InputError(f"{group}.{name} is no field of fairseq; the most similar ones are {similar}")
    for field, (least, most) in _RANGES.items():
        number = value(field)
        if number is not None and not least <= number <= most:
            raise InputError(f"{field}={number} must {_between(least, most)}")
    for field, least in _LISTS.items():
        numbers = value(field)
        if not isinstance(numbers, Sequence) or not numbers or not all(least <= each < math.inf for each in numbers):
            raise InputError(f"{field}={numbers} must be a list of one or more numbers, each {least} or more")
    for (field, needing), package in _NEEDS.items():
        if value(field) == needing and importlib.util.find_spec(package) is None:
            raise InputError(
                f"{field}={str(needing).lower()} needs {package}, which is not installed; install it or change the"
                " field"
            )
    for field, choices in _UNSHARDED.items() if value("model._name") == "stacked_hubert" else ():
        if value(field) is not None and value(field) not in choices:
            raise InputError(
                f"{field}={value(field)} is not supported, because layers that grow cannot lie in shards; choose from"
                f" {', '.join(map(str, choices))}"
            )
    if value("checkpoint.keep_interval_updates_pattern") == 0:
        raise InputError("checkpoint.keep_interval_updates_pattern=0 must be 1 or more, or -1 for none")
    if value("dataset.batch_size") is None and value("dataset.max_tokens") is None:
        raise InputError("dataset.batch_size and dataset.max_tokens are missing; set one")
    _check_devices(value)
    _check_files(value)


def _between(least: float, most: float) -> str:
    if least == most:
        return f"be {least}"
    return f"be {least} or more" if most == math.inf else f"lie between {least} and {most}"


def _check_devices(value: Callable[[str], Any]) -> None:
    chosen = [field for field in _PRECISIONS if value(field)]
    if len(chosen) > 1:
        raise InputError(f"{chosen[0]}=true and {chosen[1]}=true exclude each other; set one to false")
    gpus = 0 if value("common.cpu") or not torch.cuda.is_available() else torch.cuda.device_count()
    if not gpus and value("common.fp16"):
        raise InputError(
            "common.fp16=true needs a GPU, and there is none to use; set common.fp16=false, with common.bf16=true for"
            " half precision on a CPU"
        )
    if not gpus and value("common.profile"):
        raise InputError("common.profile=true needs a GPU, and there is none to use; set it to false")
    processes = value("distributed_training.distributed_world_size")
    launched = value("distributed_training.distributed_init_method") or any(
        name in os.environ for name in ("MASTER_ADDR", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST")
    )
    if processes > max(gpus, 1) and not launched:
        raise InputError(
            f"distributed_training.distributed_world_size={processes} is more than this machine's GPUs ({gpus}); lower"
            " it, or start the processes with torchrun"
        )


def _check_files(value: Callable[[str], Any]) -> None:
    for field in ("checkpoint.save_dir", "common.tensorboard_logdir"):
        if value(field) is not None:
            check_folder(field, value(field))
    log_file = value("common.log_file")
    if log_file is not None and (os.path.isdir(log_file) or not os.path.isdir(os.path.dirname(log_file) or ".")):
        raise InputError(f"common.log_file={log_file} must be a file in a folder that exists")
    for field in ("common.quantization_config_path", "ema.ema_seed_model"):
        if value(field) is not None and not os.path.isfile(value(field)):
            raise InputError(f"{field}={value(field)} is no file")
    overrides = value("checkpoint.optimizer_overrides")
    try:
        fits = isinstance(ast.literal_eval(overrides), dict)
    except (ValueError, SyntaxError):
        fits = False
    if not fits:
        raise InputError(f"checkpoint.optimizer_overrides={overrides} must be a dict, such as {{'weight_decay': 0.1}}")


def check_folder(field: str, folder: str) -> None:
    """Raise an InputError unless a configuration field names a folder that can be written to or created."""
    if not folder:
        raise InputError(f"{field} is empty; name a folder")
    there = Path(folder).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "cannot be written to" if there.is_dir() else "is no folder"
        raise InputError(f"{field}={folder}: {there} {problem}; choose another folder")
