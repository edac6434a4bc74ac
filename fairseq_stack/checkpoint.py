"""fairseq's checkpoint files: loaded without running code, and the student that one of them holds."""

import errno
import re
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List, Optional, Tuple

import torch

from fairseq_stack.data.waveforms import FAIRSEQ_EPSILON
from fairseq_stack.encoder_shape import check_shape
from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import plan_growth
from fairseq_stack.lengths import parse_conv_layers
from fairseq_stack.stand_ins import HARMLESS, HELD, plain, stand_ins

LFS_POINTER = b"version https://git-lfs.github.com"

# Beside the weights of a student: for each of its layers whether it is in use, [N] bool. The stage beside it counts
# in the plan of the run that saved it.
SEATS = "stage_seats"


class DamagedCheckpoint(InputError):
    """The file is cut off, altered or no checkpoint at all."""


@contextmanager
def _only_safe_globals(classes):
    """Let torch.load accept `classes`, and nothing that someone else in this process has allowed.

    torch has a context manager of its own since 2.5; it adds to the list, and 2.4 lacks it.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_checkpoint(path, header_only=False, harmless_only=False):
    """Read a fairseq checkpoint on the CPU. Nothing in the file can run.

    Args:
        path: the file.
        header_only: leave the tensors on disk, so that only plain values are read.
        harmless_only: take nothing that could run where others unpickle the file, with what its names mean there.

    Returns:
        the dict that fairseq saved; `model` has the weights, and `configurations` finds what describes them.

    Raises:
        DamagedCheckpoint: the file is damaged or not a checkpoint.
        InputError: there is no such file, it cannot be read, or it holds objects that need code to
            unpickle.
    """
    state = read_torch_file(path, header_only, harmless_only)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise DamagedCheckpoint(f"{path} holds no model; give the file of a fairseq checkpoint")
    return state


def read_torch_file(path, header_only=False, harmless_only=False):
    """What torch.save has put into a file, on the CPU, with stand-ins for objects. Nothing in the file can run.

    Args and Raises: see load_checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {problem}; give the file of a fairseq checkpoint")
    check_fetched(path)
    zipped = _is_zip(path)  # torch's format before 1.6 is not, and has no checksums
    if zipped and not header_only:
        try:
            check_whole(path)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{path}: {error}; copy it again") from None
    try:
        with _only_safe_globals(stand_ins(path, zipped, HARMLESS if harmless_only else HELD)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and header_only)
    except Exception as error:  # what a damaged file makes torch raise has no common class
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise InputError(
                f"{path} needs {needed[1]} to unpickle, and that could run code; only tensors, plain values and the"
                " configurations and dictionaries of fairseq are loaded, so save the checkpoint again without it"
            ) from None
        if zipped and not header_only and "Unsupported operand" in str(error):  # of a file whose checksums are right
            raise InputError(
                f"{path} is pickled in another protocol than torch's own, 2; load it where you trust it, and torch.save"
                " writes it anew"
            ) from None
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint that torch saved; give the file of a fairseq checkpoint"
        ) from None


def check_fetched(path):
    """Raise InputError if git has cloned a file and left its content on the server."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if begins == LFS_POINTER:
        raise InputError(f"{path} is a pointer of Git LFS in the place of the file; git lfs pull fetches it")


def _is_zip(path):
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # Python 3.10 says so of some that are damaged
        return True


def check_whole(path):
    """Compare every byte of a checkpoint with the checksums in the file, which torch writes and does not read.

    Raises:
        DamagedCheckpoint: they differ, or the file is no zip file, as torch has written since 1.6.
        InputError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DamagedCheckpoint(f"it is cut off or damaged ({error})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged zip file sends its reader to places before its beginning
            raise DamagedCheckpoint("it is cut off or damaged") from None
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if wrong:
        raise DamagedCheckpoint(f"the checksum of {wrong} is wrong")


def configurations(state):
    """The configurations of model and task in a checkpoint's content, or (None, None) where there are none.

    They stand in `cfg`. Before fairseq had that, the fields of both were in one Namespace, `args`, where `arch` names
    the model.
    """
    for place in ("cfg", "args"):
        options = plain(state.get(place))
        if not isinstance(options, dict):
            continue
        model, task = options.get("model"), options.get("task")
        if not isinstance(model, dict) or not isinstance(task, dict):
            model = task = options if "arch" in options else None
        if model is not None:
            return ({"_name": model["arch"], **model} if "arch" in model else model), task
    return None, None


@dataclass(frozen=True)
class Student:
    """A student as a checkpoint holds it, reduced to the layers that its stage uses.

    Attributes:
        config: the model's configuration, in fairseq's names.
        conv_layers: the CNN as [(channels, kernel, stride), ...].
        normalize: whether the waveforms it was trained on had zero mean and unit variance.
        normalize_epsilon: what its training then added to the variance.
        depth: D, the layers in use.
        weights: the tensors of fairseq's HubertModel without its pretraining parts, in fp32;
            `encoder.layers.0` to `encoder.layers.{D - 1}` are the layers in the order of the forward
            pass, whatever seats they have in the training model.
        heads: the prediction heads' tensors, `heads.{teacher layer}...`, in fp32.
        mask_emb: [D], the input that masked training gave to masked frames, or None.
    """

    config: dict
    conv_layers: List[Tuple[int, int, int]]
    normalize: bool
    normalize_epsilon: float
    depth: int
    weights: Dict[str, torch.Tensor]
    heads: Dict[str, torch.Tensor]
    mask_emb: Optional[torch.Tensor]


def with_moving_average(state, name="the checkpoint"):
    """The content of a checkpoint with the moving average of the weights in the place of the weights.

    Args:
        state: what load_checkpoint returns.
        name: what an error calls the checkpoint, such as its path.

    Raises:
        InputError: the run kept no moving average.
    """
    average = (state.get("extra_state") or {}).get("ema")
    if not average:
        raise InputError(f"{name} has no moving average; train with ema.store_ema=true, or export without --ema")
    # With ema.ema_fp32 there is a copy in single precision.
    average = {**average, **state["extra_state"].get("ema_fp32_params", {})}
    # What is in use has no average; the copy in single precision keeps what was in use at its beginning.
    average.update({key: value for key, value in state["model"].items() if key in ("stage", SEATS)})
    return {**state, "model": average}


def student_from_checkpoint(state, name="the checkpoint"):
    """Take the student out of the content of a fairseq checkpoint.

    Args:
        state: what load_checkpoint returns.
        name: what an error calls the checkpoint, such as its path.

    Raises:
        InputError: the checkpoint is not one of a `stacked_hubert`, or weights and configuration do
            not fit together.
    """
    config, task = configurations(state)
    if config is None:
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
        epsilon = task.get("normalize_epsilon", FAIRSEQ_EPSILON)  # what it was before it could be chosen
    if not isinstance(normalize, bool):
        raise InputError(f"{name} has task.normalize={normalize}, neither true nor false; it is damaged")
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise InputError(f"{name} has task.normalize_epsilon={epsilon}, not a number between 0 and 1; it is damaged")
    shapes = hubert_shapes(config, conv_layers, seats)

    # Layers of seats that the stage does not use stay behind, and what only training needs.
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

    def renumbered(key):
        return re.sub(r"(?<=^encoder\.layers\.)\d+", lambda match: str(position[int(match[0])]), key)

    kept = {renumbered(key): found[key].float() for key in shapes}
    heads = {key: tensor.float() for key, tensor in weights.items() if key.startswith("heads.")}
    mask_emb = weights.get("mask_emb")
    mask_emb = None if mask_emb is None else mask_emb.float()
    return Student(config, conv_layers, normalize, epsilon, len(seats), kept, heads, mask_emb)


@contextmanager
def _described_student(name):
    """Turn what a configuration that describes no student makes of its readers into an InputError."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{name} lacks {error}, which every checkpoint of a stacked_hubert has") from None
    except (InputError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} has a configuration that describes no student: {error}") from None


def seats_in_use(config, weights, name="the checkpoint"):
    """The layers of the training model that the student in a checkpoint uses.

    Args:
        config: the model's configuration in the same checkpoint, in whose plan the stage counts.
        weights: the state dict of the model.
        name: what an error calls the checkpoint, such as its path.

    Returns:
        tuple of the indices N of `encoder.layers.N`, in the order of the forward pass.

    Raises:
        InputError: the configuration describes no student, or the weights do not belong to it.
    """
    with _described_student(name):
        check_shape(SimpleNamespace(**config))
        plan = plan_growth(config["stack_method"], config["encoder_layers"], config["stack_stages"])
        stage = weights["stage"].item()
        used = weights[SEATS].tolist() if SEATS in weights else None  # older checkpoints have the stage alone
    if stage not in range(len(plan.stages)):
        raise InputError(f"{name} has stage {stage}, not one of 0 to {len(plan.stages) - 1}; it is damaged")
    stage = int(stage)
    if used is not None and used != plan.uses(stage):
        raise InputError(
            f"{name} does not use the layers that its configuration says, which are those of stage {stage + 1} of"
            f" {plan_text(SimpleNamespace(**config))}; it is damaged"
        )
    return plan.stages[stage]


def plan_text(config):
    """The fields that make the growth plan of a model's configuration, as one types them."""
    return f"model.stack_method={config.stack_method} model.stack_stages={config.stack_stages}"


def layers_text(seats):
    """Layers of the training model by their names in its state dict."""
    return f"encoder.layers {', '.join(map(str, seats))}"


def _conv_layers(text):
    try:
        return parse_conv_layers(text)
    except ValueError:
        raise InputError(
            f"model.conv_feature_layers={text} is not a list of (channels, kernel, stride)"
        ) from None


def hubert_shapes(config, conv_layers, layers):
    """Names and shapes of the tensors of fairseq's HubertModel, without its pretraining parts.

    Args:
        config: fairseq's configuration of the model.
        conv_layers: the CNN as [(channels, kernel, stride), ...].
        layers: indices of the transformer layers.

    Returns:
        {name: shape}.
    """
    width, inner, kernel = config["encoder_embed_dim"], config["encoder_ffn_embed_dim"], config["conv_pos"]
    shapes, channels = {}, 1

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def linear(name, inputs, outputs):
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
