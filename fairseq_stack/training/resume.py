"""What a checkpoint of one configuration may be under another.

A checkpoint is loaded by a resumed run, with optimiser and schedule, or gives its weights alone to a new run.
In both cases the network has to be the same, with the same layers in use. A resumed run keeps its inputs, targets and
loss too. Everything else may change, and is logged.
"""

import logging
import math
import os
from types import SimpleNamespace

import torch

from fairseq_stack.checkpoints.read import configurations
from fairseq_stack.checkpoints.student import seats_in_use
from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import SEATS, layers_text, plan_text
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON

logger = logging.getLogger(__name__)

# What the student computes from its weights.
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
# What the heads and the optimiser's moments were made for. Weights of the loss are not among it.
TRAINING = {
    "task": ("whisper_pad", "normalize"),
    "criterion": ("loss", "teacher_layers", "intermediate_style", "target_normalization"),
}
# What decides which heads there are, their width, and whether there is an embedding of masked frames.
HEADS = {
    "task": ("teacher", "mask_prob"),
    "criterion": ("loss", "teacher_layers", "intermediate_style", "output_weight"),
}
# What a validation loss measures. A best one that measured something else is no bound for those to come.
MEASURED = {
    "task": ("mask_prob", "mask_length", "max_sample_size"),
    "criterion": None,
    "dataset": ("valid_subset", "combine_valid_subsets"),
    "checkpoint": ("best_checkpoint_metric", "maximize_best_checkpoint_metric"),
}
# What makes a training, to be logged where it differs; None for a whole section.
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


def saved_configuration(state, path, field):
    """The configuration of the run that saved a checkpoint of a student, as plain values.

    Args:
        state: the checkpoint's content, as load_checkpoint gives it.
        path: of the file.
        field: the field of the configuration that chose the file, for errors.

    Raises:
        InputError: it is no training checkpoint of a `stacked_hubert`.
    """
    model, task = configurations(state)
    if model is None:
        raise InputError(f"{path} has no configuration, as every checkpoint of a student has; choose another {field}")
    if model.get("_name") != "stacked_hubert":
        raise InputError(f"{path} holds a model named {model.get('_name')}, no stacked_hubert; choose another {field}")
    extra, history = state.get("extra_state"), state.get("optimizer_history")
    if not isinstance(extra, dict) or "train_iterator" not in extra or not history:
        raise InputError(f"{path} holds weights without the state of a training; choose another {field}")
    # What it was before it could be chosen.
    return {**state["cfg"], "task": {"normalize_epsilon": FAIRSEQ_EPSILON, **task}}


def fit(state, path, field, saved, cfg, model, teacher, new_run):
    """Make the content of a checkpoint what this run can load, and log what differs.

    Args:
        state: the content, changed in place: the seats in use are added where an older version left them out, and for
            a new run what belongs to the run that saved it is taken out.
        path, field: see saved_configuration.
        saved: its configuration.
        cfg: this run's, as plain values too.
        model: this run's StackedHubert, before it loads.
        teacher: this run's, as task.state has it.
        new_run: whether the weights alone are taken over.

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
        _check_training(state, path, keep, saved, cfg, teacher)
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


def _start_of(saved):
    return (saved.get("checkpoint") or {}).get("finetune_from_model")


def _absolute(path):
    return path and os.path.realpath(path)


def differences(saved, cfg, sections):
    """Fields with another value in `cfg` than in `saved`, as one line of text.

    Args:
        saved, cfg: configurations as plain values. A field that one of them lacks is of another version.
        sections: {section: its fields}, None for all of them.
    """
    found = {}
    for section, fields in sections.items():
        ours, theirs = cfg.get(section) or {}, saved.get(section) or {}
        for name in fields or ours:
            if name not in ours or name not in theirs or _same(name, ours[name], theirs[name]):
                continue
            # One that other sections take over by interpolation is the first's.
            key = section if name == "_name" else name
            found.setdefault(key, f"{section}.{name}={theirs[name]} there and {ours[name]} here")
    return ", ".join(found.values())


def _same(name, one, other):
    if name == "save_dir":
        return True  # where a run lies makes no difference to it
    if name == "teacher_layers" and isinstance(one, list) and isinstance(other, list):
        return sorted(one, key=str) == sorted(other, key=str)  # in any order
    if name == "conv_feature_layers":
        try:
            return parse_conv_layers(one) == parse_conv_layers(other)
        except (ValueError, TypeError, AttributeError):
            return False
    return one == other


def _name_seats(state, config, path):
    """Add what says which layers are in use to weights and moving average of an older version."""
    for weights in (state["model"], state["extra_state"].get("ema") or {}):
        if "stage" in weights:
            uses = seats_in_use(config, weights, path)
            weights[SEATS] = torch.tensor([float(seat in uses) for seat in range(config["encoder_layers"])])
    # The copy in single precision shares memory with the average, whose stage is to count in the plan of this run.
    for name in ("stage", SEATS, "plateau"):
        state["extra_state"].get("ema_fp32_params", {}).pop(name, None)


def _check_plan(weights, path, field, saved, cfg, model):
    seats = seats_in_use(saved, weights, path)
    if model.plan.stage_that_uses(weights[SEATS].tolist()) is None:
        theirs, ours = (plan_text(SimpleNamespace(**config)) for config in (saved, cfg))
        raise InputError(
            f"{path} uses {layers_text(seats)} of {saved['encoder_layers']} with {theirs}, and no stage of this"
            f" configuration with {ours} uses the same; set {theirs}, or choose another {field} (a finished student"
            " fits every method)"
        )


def _check_weights(weights, path, keep, saved, cfg, model):
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
            if name.startswith("feature_extractor.") and not _rounded_alike(value.cpu(), weights[name]):
                raise InputError(
                    f"{path} has another CNN than task.teacher={cfg['task']['teacher']}, which computes the features"
                    " with model.share_teacher_cnn=true; set it to false"
                )


def _shape(value):
    return tuple(value.shape) if torch.is_tensor(value) else "missing" if value is None else type(value).__name__


def _rounded_alike(one, other):
    """Whether two tensors are the same but for the rounding of half precision."""
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-6)


def _check_training(state, path, keep, saved, cfg, teacher):
    advice = (
        f"{keep}; checkpoint.finetune_from_model={path} with a new checkpoint.save_dir starts a new run from its"
        " weights"
    )
    sections = TRAINING
    if saved["task"].get("normalize"):
        sections = {**TRAINING, "task": (*TRAINING["task"], "normalize_epsilon")}
    different = differences(saved, cfg, sections)
    if different:
        raise InputError(f"{path} cannot resume under another training: {different}; {advice}")
    known = (state.get("task_state") or {}).get("teacher")
    if known is not None and known != teacher:
        raise InputError(
            f"{path} has learned from task.teacher={saved['task'].get('teacher')}, and"
            f" task.teacher={cfg['task']['teacher']} has other weights now; {advice}"
        )
    if bool(saved["model"].get("feature_grad_mult", 1)) != bool(cfg["model"]["feature_grad_mult"]):
        different = differences(saved, cfg, {"model": ("feature_grad_mult",)})
        raise InputError(f"{path} cannot resume with other parameters to train: {different}; {advice}")


def _forget_the_run(state):
    """Take out what a new run must not take over: updates done, the wait for a plateau, the average, the time."""
    state["optimizer_history"] = []
    state["model"].pop("plateau", None)
    for name in ("ema", "ema_fp32_params", "previous_training_time"):
        state["extra_state"].pop(name, None)


def _forget_the_best(state):
    """Take out what later validation losses would be compared with; when the stage began stays known."""
    state["extra_state"].pop("best", None)
    if "plateau" in state["model"]:
        start, _, _, seen = state["model"]["plateau"].tolist()
        state["model"]["plateau"] = torch.tensor([start, math.inf, 0, seen], dtype=torch.float64)
