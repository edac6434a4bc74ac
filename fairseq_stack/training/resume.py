"""Checks whether a checkpoint fits another configuration.

A resumed run loads a checkpoint with optimizer and schedule. A new run loads only its weights.
Both need the same network with the same layers in use. A resumed run also needs the same inputs, targets and loss.
Everything else may change; the differences are logged.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairseq_stack.checkpoints.read import configurations
from fairseq_stack.checkpoints.student import seats_in_use
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import SEATS, layers_text, plan_text
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.models.stacked_hubert import StackedHubert
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON

logger = logging.getLogger(__name__)

# The fields that decide what the student computes from its weights.
NETWORK = (
    "extractor_mode",
    "conv_feature_layers",
    "conv_bias",
    "feature_layer_norm",
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "activation_fn",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "head_shared",
    "head_inner_dim",
)
# The fields for which the heads and the optimizer's moments were trained. The weights of the losses may change.
TRAINING = {
    "task": ("whisper_pad", "normalize"),
    "criterion": ("loss", "teacher_layers", "intermediate_style", "target_normalization"),
}
# The fields that decide the number and width of the heads, and whether masked frames have an embedding.
HEADS = {
    "task": ("teacher", "target_format", "mask_prob"),
    "criterion": ("loss", "teacher_layers", "intermediate_style", "output_weight"),
}
# The fields that decide what the validation loss measures. If one changes, the best loss so far does not count.
MEASURED = {
    "task": ("mask_prob", "mask_length", "max_sample_size"),
    "criterion": None,
    "dataset": ("valid_subset", "combine_valid_subsets"),
    "checkpoint": ("best_checkpoint_metric", "maximize_best_checkpoint_metric"),
}
# The fields whose differences are logged; None for all fields of a section.
LOGGED = {
    "task": None,
    "criterion": None,
    "optimization": None,
    "optimizer": None,
    "lr_scheduler": None,
    "model": None,
    "ema": None,
    "common": ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16"),
    "dataset": ("train_subset", "valid_subset", "batch_size", "max_tokens"),
}


def saved_configuration(state: dict[str, Any], path: str, field: str) -> dict[str, Any]:
    """Return the configuration of the run that saved a checkpoint of a student, as plain values.

    Args:
        state: the checkpoint's content from load_checkpoint.
        path: the path of the file.
        field: the field of the configuration that names the file, for errors.

    Raises:
        InputError: the file is not a training checkpoint of a `stacked_hubert`.
    """
    model, task = configurations(state)
    if model is None or task is None:
        raise InputError(f"{path} has no configuration, as every checkpoint of a student has; choose another {field}")
    if model.get("_name") != "stacked_hubert":
        raise InputError(f"{path} holds a model named {model.get('_name')}, no stacked_hubert; choose another {field}")
    extra, history = state.get("extra_state"), state.get("optimizer_history")
    if not isinstance(extra, dict) or "train_iterator" not in extra or not history:
        raise InputError(f"{path} holds weights without the state of a training; choose another {field}")
    # The epsilon is that of versions without this field.
    return {**state["cfg"], "task": {"normalize_epsilon": FAIRSEQ_EPSILON, **task}}


def fit(
    state: dict[str, Any],
    path: str,
    field: str,
    saved: dict[str, Any],
    cfg: dict[str, Any],
    model: StackedHubert,
    task_state: Mapping[str, Any],
    new_run: bool,
) -> None:
    """Change the content of a checkpoint so that this run can load it, and log the differences.

    Args:
        state: the content, changed in place. The layers in use are added where an older version left them out. For a
            new run, the state of the run that saved it is removed.
        path, field: see saved_configuration.
        saved: the configuration in the checkpoint.
        cfg: this run's configuration, as plain values too.
        model: this run's model, before it loads.
        task_state: the digests of this run's teacher and codebooks, as its task saves them.
        new_run: whether this run takes only the weights.

    Raises:
        InputError: the file cannot be loaded under this configuration.
    """
    keep = f"keep that configuration, or choose another {field}"
    start = cfg["checkpoint"]["finetune_from_model"]
    if field == "checkpoint.save_dir" and start and _absolute(start) != _absolute(_start_of(saved)):
        raise InputError(
            f"{path} is of a run that did not start from checkpoint.finetune_from_model={start}; give a new"
            " checkpoint.save_dir to start from there, or leave the field out to resume that run"
        )
    different = differences(saved, cfg, {"model": NETWORK})
    if different:
        raise InputError(f"{path} has another network than this configuration: {different}; {keep}")
    _name_seats(state, saved["model"], path)
    _check_plan(state["model"], path, field, saved["model"], cfg["model"], model)
    _check_weights(state["model"], path, keep, saved, cfg, model)
    if new_run:
        _forget_the_run(state)
    else:
        _check_training(state, path, keep, saved, cfg, task_state)
        different = differences(saved, cfg, MEASURED)
        if different:
            _forget_the_best(state)
            logger.info(f"resume | the search for the best validation loss starts anew, because of {different}")
    if cfg["ema"]["store_ema"] and "ema" not in state["extra_state"]:
        state["extra_state"]["ema"] = dict(state["model"])
        logger.info("resume | the moving average starts from the weights of the checkpoint")
    different = differences(saved, cfg, LOGGED)
    if new_run:
        uses = int(state["model"][SEATS].sum())
        logger.info(f"resume | {path} gives its weights, {uses} layers in use, to a new run that starts at update 0")
    if different:
        logger.info(f"resume | this configuration differs from that of {path}: {different}")


def _start_of(saved: Mapping[str, Any]) -> str | None:
    return (saved.get("checkpoint") or {}).get("finetune_from_model")


def _absolute(path: str | None) -> str | None:
    return path and os.path.realpath(path)


def differences(saved: Mapping[str, Any], cfg: Mapping[str, Any], sections: Mapping[str, Sequence[str] | None]) -> str:
    """Return the fields whose values differ between `saved` and `cfg`, as one line of text.

    Args:
        saved, cfg: configurations as plain values. A field that only one of them has belongs to another version.
        sections: {section: its fields}, None for all fields.
    """
    found = {}
    for section, fields in sections.items():
        ours, theirs = cfg.get(section) or {}, saved.get(section) or {}
        for name in fields or ours:
            if name not in ours or name not in theirs or _same(name, ours[name], theirs[name]):
                continue
            # Report a field once, even if other sections copy it by interpolation.
            key = section if name == "_name" else name
            found.setdefault(key, f"{section}.{name}={theirs[name]} there and {ours[name]} here")
    return ", ".join(found.values())


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "save_dir":
        return True  # a run may be moved
    if name == "conv_feature_layers":
        try:
            return parse_conv_layers(one) == parse_conv_layers(other)
        except (ValueError, TypeError, AttributeError):
            return False
    if name == "teacher_layers" and isinstance(one, list) and isinstance(other, list):
        return sorted(one, key=str) == sorted(other, key=str)  # in any order
    return one == other


def _name_seats(state: dict[str, Any], config: dict[str, Any], path: str) -> None:
    """Add the layers in use to the weights and the moving average of an older version."""
    for weights in (state["model"], state["extra_state"].get("ema") or {}):
        if "stage" in weights:
            uses = seats_in_use(config, weights, path)
            weights[SEATS] = torch.tensor([float(seat in uses) for seat in range(config["encoder_layers"])])
    # The fp32 copy shares memory with the average, whose stage must count in the growth plan of this run.
    for name in ("stage", SEATS, "plateau"):
        state["extra_state"].get("ema_fp32_params", {}).pop(name, None)


def _check_plan(
    weights: dict[str, Tensor],
    path: str,
    field: str,
    saved: dict[str, Any],
    cfg: dict[str, Any],
    model: StackedHubert,
) -> None:
    seats = seats_in_use(saved, weights, path)
    if model.plan.stage_that_uses(weights[SEATS].tolist()) is None:
        theirs, ours = (plan_text(SimpleNamespace(**config)) for config in (saved, cfg))
        raise InputError(
            f"{path} uses {layers_text(seats)} of {saved['encoder_layers']} with {theirs}, and no stage of this"
            f" configuration with {ours} uses the same; set {theirs}, or choose another {field} (a finished student"
            " fits every method)"
        )


def _check_weights(
    weights: dict[str, Any],
    path: str,
    keep: str,
    saved: dict[str, Any],
    cfg: dict[str, Any],
    model: StackedHubert,
) -> None:
    expected = model.state_dict()
    for name in {**expected, **weights}:
        if name in ("plateau", SEATS):
            continue
        there, here = (_shape(each.get(name)) for each in (weights, expected))
        if there != here:
            different = differences(saved, cfg, HEADS)
            because = f" ({different})" if different else ""
            raise InputError(
                f"{path} does not fit the model of this configuration: {name} is {there} there and {here}"
                f" here{because}; {keep}"
            )
    if cfg["model"].get("share_teacher_cnn"):
        for name, value in expected.items():
            if name.startswith("feature_extractor.") and not _same_up_to_rounding(value.cpu(), weights[name]):
                raise InputError(
                    f"{path} has another CNN than task.teacher={cfg['task']['teacher']}, which computes the features"
                    " with model.share_teacher_cnn=true; set it to false"
                )


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if torch.is_tensor(value) else "missing" if value is None else type(value).__name__


def _same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ at most by the rounding of half precision."""
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-6)


def _check_training(
    state: dict[str, Any],
    path: str,
    keep: str,
    saved: dict[str, Any],
    cfg: dict[str, Any],
    task_state: Mapping[str, Any],
) -> None:
    advice = (
        f"{keep}; checkpoint.finetune_from_model={path} with a new checkpoint.save_dir starts a new run from its"
        " weights"
    )
    sections: dict[str, tuple[str, ...]] = TRAINING
    if saved["task"].get("normalize"):
        sections = {**TRAINING, "task": (*TRAINING["task"], "normalize_epsilon")}
    different = differences(saved, cfg, sections)
    if different:
        raise InputError(f"{path} cannot resume under another training: {different}; {advice}")
    known = state.get("task_state") or {}
    if known.get("teacher") not in (None, task_state.get("teacher")):
        raise InputError(
            f"{path} has learned from task.teacher={saved['task'].get('teacher')}, and"
            f" task.teacher={cfg['task']['teacher']} has other weights now; {advice}"
        )
    if LOSSES[cfg["criterion"]["loss"]].codes and known.get("codebooks") not in (None, task_state.get("codebooks")):
        raise InputError(
            f"{path} has learned codes of other codebooks than those in"
            f" task.target_store={cfg['task']['target_store']}; give the store that it was trained with, or {advice}"
        )
    if bool(saved["model"].get("feature_grad_mult", 1)) != bool(cfg["model"]["feature_grad_mult"]):
        different = differences(saved, cfg, {"model": ("feature_grad_mult",)})
        raise InputError(f"{path} cannot resume with other parameters to train: {different}; {advice}")


def _forget_the_run(state: dict[str, Any]) -> None:
    """Remove what a new run must not keep: updates done, the wait for a plateau, the moving average, the time."""
    state["optimizer_history"] = []
    state["model"].pop("plateau", None)
    for name in ("ema", "ema_fp32_params", "previous_training_time"):
        state["extra_state"].pop(name, None)


def _forget_the_best(state: dict[str, Any]) -> None:
    """Remove the best validation loss, but keep the beginning of the stage."""
    state["extra_state"].pop("best", None)
    if "plateau" in state["model"]:
        start, _, _, seen = state["model"]["plateau"].tolist()
        state["model"]["plateau"] = torch.tensor([start, math.inf, 0, seen], dtype=torch.float64)
