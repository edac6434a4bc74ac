"""Takes the student out of a fairseq checkpoint."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairseq_stack.checkpoints.read import configurations
from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import METHODS, SEATS, layers_text, plan_growth, plan_text
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.models.shape import check_shape
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON


@dataclass(frozen=True)
class Output:
    """The output layers of a fine-tuned student, for CTC or for classes of utterances.

    Attributes:
        maps: weight [out, in] and bias [out] of each linear map, one after the other, in fp32.
        pooled: whether a mean over an utterance's frames follows the first map.
        labels: what each output stands for: a class, or a letter. CTC's blank is empty.
    """

    maps: list[tuple[Tensor, Tensor]]
    pooled: bool
    labels: list[str]


@dataclass(frozen=True)
class Student:
    """A student from a checkpoint, with the layers that its stage uses.

    Attributes:
        config: the model's configuration, with fairseq's names of the fields.
        conv_layers: the CNN as [(channels, kernel, stride), ...].
        normalize: whether it was trained on waveforms with zero mean and unit variance.
        normalize_epsilon: the number that this normalization added to the variance.
        depth: D, the number of layers in use.
        weights: the tensors of fairseq's HubertModel without its pretraining parts, in fp32.
            `encoder.layers.0` to `encoder.layers.{D - 1}` are the layers in the order of the forward pass. Their
            indices in the training model may differ.
        heads: the tensors of the prediction heads, `heads.{teacher layer}...`, in fp32.
        mask_emb: [width], the embedding that replaces masked frames in training, or None.
        output: the output layers of a fine-tuned student, else None.
    """

    config: dict[str, Any]
    conv_layers: list[tuple[int, int, int]]
    normalize: bool
    normalize_epsilon: float
    depth: int
    weights: dict[str, Tensor]
    heads: dict[str, Tensor]
    mask_emb: Tensor | None
    output: Output | None = None


def with_moving_average(state: dict[str, Any], name: str = "the checkpoint") -> dict[str, Any]:
    """Return the content of a checkpoint with its moving average as the weights.

    Args:
        state: the result of load_checkpoint.
        name: the checkpoint's name in errors, such as its path.

    Raises:
        InputError: the run kept no moving average.
    """
    average = (state.get("extra_state") or {}).get("ema")
    if not average:
        raise InputError(f"{name} has no moving average; train with ema.store_ema=true, or export without --ema")
    # With ema.ema_fp32, the checkpoint also has a copy in single precision.
    average = {**average, **state["extra_state"].get("ema_fp32_params", {})}
    # The layers in use have no average, and the fp32 copy has those of the start of the run.
    average.update({key: value for key, value in state["model"].items() if key in ("stage", SEATS)})
    return {**state, "model": average}


def student_from_checkpoint(state: dict[str, Any], name: str = "the checkpoint") -> Student:
    """Return the student in the content of a fairseq checkpoint.

    Args:
        state: the result of load_checkpoint.
        name: the checkpoint's name in errors, such as its path.

    Raises:
        InputError: the checkpoint does not hold a `stacked_hubert`, or its weights do not fit its configuration.
    """
    config, task = configurations(state)
    if config is None or task is None:
        raise InputError(f"{name} has no configuration; give a checkpoint of a stacked_hubert")
    if config.get("_name") != "stacked_hubert":
        raise InputError(f"{name} holds a model named {config.get('_name')}; give a checkpoint of a stacked_hubert")
    weights = state["model"]
    broken = [key for key in weights if not isinstance(key, str) or not torch.is_tensor(weights[key])]
    if broken:
        raise InputError(f"{name} has {weights[broken[0]]!r} for the weight {broken[0]}; it is damaged")
    seats = seats_in_use(config, weights, name)
    with _described_student(name):
        conv_layers = _conv_layers(config["conv_feature_layers"])
        normalize = task["normalize"]
        epsilon = task.get("normalize_epsilon", FAIRSEQ_EPSILON)  # the value of versions without this field
    if not isinstance(normalize, bool):
        raise InputError(f"{name} has task.normalize={normalize}, neither true nor false; it is damaged")
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise InputError(f"{name} has task.normalize_epsilon={epsilon}, not a number between 0 and 1; it is damaged")
    shapes = hubert_shapes(config, conv_layers, seats)

    # Leave out the layers that the stage does not use and the tensors that only training needs.
    idle = tuple(f"encoder.layers.{seat}." for seat in range(config["encoder_layers"]) if seat not in seats)
    found = {
        key: tensor
        for key, tensor in weights.items()
        if not key.startswith((*idle, "heads.")) and key not in ("mask_emb", "stage", SEATS, "plateau")
    }
    for key in {**shapes, **found}:
        if key not in found:
            raise InputError(f"{name} lacks the weight {key}; the file is damaged or of another version")
        if key not in shapes:
            raise InputError(f"{name} has the weight {key}, which its configuration has no place for")
        shape = tuple(found[key].shape)
        if shape != shapes[key]:
            raise InputError(f"{name} has {key} in the shape {shape}; its configuration says {shapes[key]}")

    position = {seat: index for index, seat in enumerate(seats)}

    def renumbered(key: str) -> str:
        return re.sub(r"(?<=^encoder\.layers\.)\d+", lambda match: str(position[int(match[0])]), key)

    kept = {renumbered(key): found[key].float() for key in shapes}
    heads = {key: tensor.float() for key, tensor in weights.items() if key.startswith("heads.")}
    mask_emb = weights.get("mask_emb")
    mask_emb = None if mask_emb is None else mask_emb.float()
    return Student(config, conv_layers, normalize, epsilon, len(seats), kept, heads, mask_emb)


@contextmanager
def _described_student(name: str) -> Iterator[None]:
    """Turn the errors of reading a configuration that describes no student into an InputError."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{name} lacks {error}, which every checkpoint of a stacked_hubert has") from None
    except (InputError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} has a configuration that describes no student: {error}") from None


def seats_in_use(config: dict[str, Any], weights: dict[str, Tensor], name: str = "the checkpoint") -> tuple[int, ...]:
    """Return which layers of the training model the student in a checkpoint uses.

    Args:
        config: the model's configuration in the same checkpoint. The stage counts in its growth plan.
        weights: the state dict of the model.
        name: the checkpoint's name in errors, such as its path.

    Returns:
        the indices N of `encoder.layers.N`, in the order of the forward pass.

    Raises:
        InputError: the configuration describes no student, or the weights do not belong to it.
    """
    with _described_student(name):
        check_shape(SimpleNamespace(**config))
        stage = weights["stage"].item()
        used = weights[SEATS].tolist() if SEATS in weights else None  # older checkpoints have only the stage
        if used is not None and config["stack_method"] not in METHODS:  # an extension's method, which may not be loaded
            if len(used) != config["encoder_layers"] or not any(used) or not set(used) <= {0, 1}:
                raise InputError(f"{SEATS} has {used} for {config['encoder_layers']} layers")
            return tuple(seat for seat, uses in enumerate(used) if uses)
        plan = plan_growth(config["stack_method"], config["encoder_layers"], config["stack_stages"])
    if stage not in range(len(plan.stages)):
        raise InputError(f"{name} has stage {stage}, not one of 0 to {len(plan.stages) - 1}; it is damaged")
    stage = int(stage)
    if used is not None and used != plan.uses(stage):
        raise InputError(
            f"{name} uses other layers than its configuration says: stage {stage + 1} of"
            f" {plan_text(SimpleNamespace(**config))} uses {layers_text(plan.stages[stage])}; it is damaged"
        )
    return plan.stages[stage]


def _conv_layers(text: str) -> list[tuple[int, int, int]]:
    try:
        return parse_conv_layers(text)
    except ValueError:
        raise InputError(f"model.conv_feature_layers={text} is not a list of (channels, kernel, stride)") from None


def hubert_shapes(
    config: dict[str, Any], conv_layers: Sequence[tuple[int, int, int]], layers: Iterable[int]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of fairseq's HubertModel, without its pretraining parts.

    Args:
        config: fairseq's configuration of the model.
        conv_layers: the CNN as [(channels, kernel, stride), ...].
        layers: indices of the transformer layers.

    Returns:
        {name: shape}.
    """
    width, inner, kernel = config["encoder_embed_dim"], config["encoder_ffn_embed_dim"], config["conv_pos"]
    shapes, channels = {}, 1

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for index, (outputs, size, _) in enumerate(conv_layers):
        block = f"feature_extractor.conv_layers.{index}"
        shapes[f"{block}.0.weight"] = (outputs, channels, size)
        if config["conv_bias"]:
            shapes[f"{block}.0.bias"] = (outputs,)
        if config["extractor_mode"] == "layer_norm":
            norm(f"{block}.2.1", outputs)
        elif index == 0:
            norm(f"{block}.2", outputs)
        channels = outputs
    if config.get("feature_layer_norm", True):
        norm("layer_norm", channels)
    if channels != width:
        linear("post_extract_proj", channels, width)

    # Weight norm over the kernel: a length (g) and a direction (v).
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, kernel)
    shapes["encoder.pos_conv.0.weight_v"] = (width, width // config["conv_pos_groups"], kernel)
    shapes["encoder.pos_conv.0.bias"] = (width,)
    for index in layers:
        layer = f"encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", width, width)
        norm(f"{layer}.self_attn_layer_norm", width)
        linear(f"{layer}.fc1", width, inner)
        linear(f"{layer}.fc2", inner, width)
        norm(f"{layer}.final_layer_norm", width)
    norm("encoder.layer_norm", width)
    return shapes
