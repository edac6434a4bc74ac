"""Teachers from folders in Hugging Face's format, through transformers' own models."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Data2VecAudioModel,
    HubertModel,
    PreTrainedModel,
    UniSpeechModel,
    UniSpeechSatModel,
    Wav2Vec2Model,
    WavLMModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fairseq_stack.checkpoints.read import DamagedCheckpoint, check_fetched, read_torch_file
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.models.conv_extractor import normed_convolution
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.models.pos_conv import PositionalConv1d
from fairseq_stack.models.shape import MOST_LAYERS
from fairseq_stack.models.waveform_norm import TRANSFORMERS_EPSILON, normalize_waveforms
from fairseq_stack.teachers.base import Teacher, exact_fp32, load_weights
from fairseq_stack.teachers.families import FAMILIES
from fairseq_stack.teachers.whisper import WhisperTeacher

MASK_EMBEDDING = "masked_spec_embed"  # of masked frames; a teacher masks none
# Older files have the names of torch's first weight norm, today's models of transformers those of the second.
WEIGHT_NORM = {
    "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
}


class HuggingFaceTeacher(Teacher):
    """HuBERT and its relatives, as models of transformers.

    For an utterance in a padded batch, this gives what transformers gives for the utterance alone. A padded batch
    is therefore processed in another way than by transformers' own forward pass:
    - A group norm computes its statistics over each utterance's own frames.
    - Each block of data2vec's positional convolution, and a positional convolution after a batch norm, sees zeros
      after the end of an utterance.
    - Attention is masked for every model. transformers advises against this for models with a group norm, which
      were trained on batches whose padding entered the norm.

    Args:
        name: the file or folder that it comes from.
        family: see Teacher.
        model: one of transformers' models, loaded.
        normalize: whether it takes waveforms of zero mean and unit variance.
        epsilon: see normalize_waveforms.
    """

    epsilon: float
    model: Any  # transformers' models, whose attributes torch declares as Tensor | Module

    def __init__(
        self,
        name: str,
        family: str,
        model: PreTrainedModel,
        normalize: bool | None,
        epsilon: float = TRANSFORMERS_EPSILON,
    ) -> None:
        self.name = name
        self.family = family
        self.model = model
        self.normalize = normalize
        self.epsilon = epsilon
        self.layers = self.model.encoder.layers
        self.depth = len(self.layers)
        self.width = self.model.config.hidden_size
        shape = self.model.config
        if shape.feat_extract_activation != "gelu":
            raise InputError(
                f"{name}/config.json has feat_extract_activation={shape.feat_extract_activation}, which no known model"
                " has; give a model with gelu"
            )
        self.conv_layers = list(zip(shape.conv_dim, shape.conv_kernel, shape.conv_stride))
        for module in list(self.model.encoder.pos_conv_embed.modules()):
            for child, conv in list(module.named_children()):
                if isinstance(conv, torch.nn.Conv1d):
                    setattr(module, child, PositionalConv1d(conv))

    def frames(self, samples: int) -> int:
        return frames_from_samples(samples, self.conv_layers)

    @torch.no_grad()
    @exact_fp32()
    def hidden_states(self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        self.model.encoder.layers = self.layers[: max(layers)]
        self.model.to(waveforms.device)
        waveforms = waveforms.float()
        if self.normalize:
            waveforms = normalize_waveforms(waveforms, lengths, self.epsilon)
        features = self._features(waveforms, lengths).transpose(1, 2)
        x = self.model.feature_projection(features)
        x = x[0] if isinstance(x, tuple) else x
        frames = frames_from_samples(lengths, self.conv_layers)
        valid = torch.arange(x.size(1)) < frames.cpu()[:, None]
        valid = None if bool(valid.all()) else valid.to(x.device, non_blocking=True)

        outputs = {}
        with ExitStack() as hooks:
            if 0 in layers:
                hooks.enter_context(self.layers[0].register_forward_pre_hook(_keep_input(outputs)))
            for number, layer in enumerate(self.model.encoder.layers, start=1):
                if number in layers:
                    hooks.enter_context(layer.register_forward_hook(_keep(outputs, number)))
            if valid is not None:
                positions = self.model.encoder.pos_conv_embed
                # Inputs that are not zero after the end: those of data2vec's blocks, and the output of a batch norm.
                after_batch_norm = [positions.conv] if getattr(positions, "batch_norm", None) is not None else []
                for block in getattr(positions, "layers", after_batch_norm):
                    hooks.enter_context(block.register_forward_pre_hook(_zero_padding(valid)))
            final = self.model.encoder(x, attention_mask=valid)[0]
        if self.depth in layers:
            outputs[self.depth] = final  # a pre-norm encoder has applied its final layer norm
        return outputs

    def _features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Return the CNN's features [B, C, T] of samples [B, S]; a group norm ignores the padding."""
        x = waveforms[:, None].to(self.dtype)
        blocks = list(self.model.feature_extractor.conv_layers)
        norm = getattr(blocks[0], "layer_norm", None)
        if isinstance(norm, torch.nn.GroupNorm):
            first = blocks.pop(0)
            frames = frames_from_samples(lengths, self.conv_layers[:1])
            x = first.activation(normed_convolution(waveforms, frames, first.conv, norm)).transpose(1, 2)
        for block in blocks:
            x = block(x)
        return x


def _keep(outputs: dict[int, Tensor], number: int) -> Callable:
    def hook(module, inputs, output):
        outputs[number] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_input(outputs: dict[int, Tensor]) -> Callable:
    def hook(module, inputs):
        outputs[0] = inputs[0]

    return hook


def _zero_padding(valid: Tensor) -> Callable:
    def hook(module, inputs):
        return (inputs[0] * valid[:, None],)

    return hook


def load_huggingface_teacher(folder: str | Path, whisper_pad: bool = False) -> Teacher:
    """Load a model and its feature extractor from a folder that `save_pretrained` of transformers 4 or 5 wrote.

    The function reads config.json, the weights, and preprocessor_config.json or processor_config.json. The weights are
    safetensors, or else torch.save's files; one file or several. No code of the folder runs, and nothing is
    downloaded: the model is of one of FAMILIES, and config.json's fields count only if transformers' own
    configuration has them.

    Args:
        folder: its path.
        whisper_pad: see WhisperTeacher.

    Raises:
        InputError: a file is missing or damaged, the model is of another kind, or weights do not fit.
    """
    folder = Path(folder)
    name = str(folder)
    config = _read_json(folder, "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"task.teacher={name} has model_type={kind} in its config.json; give one of {', '.join(FAMILIES)}"
        )
    if whisper_pad and kind != "whisper":
        raise InputError(f"task.whisper_pad=true, but task.teacher={name} is a {kind}; set it to false")
    family = FAMILIES[kind]
    normalize = _normalizes(folder, optional=not family.takes_waveforms)
    options = {"pad": True} if whisper_pad else {}
    return family.load(name, config, _read_weights(folder, family.prefixes), normalize, **options)


def _like_hubert(kind: str, called: str, architecture: type[PreTrainedModel]) -> None:
    """Register a `model_type` whose models HuggingFaceTeacher can run."""

    @FAMILIES.register(kind, prefixes=(f"{kind.replace('-', '_')}.",))
    def load(name, config, weights, normalize):
        return HuggingFaceTeacher(name, called, loaded(architecture, config, weights, name), normalize)


_like_hubert("hubert", "HuBERT", HubertModel)
_like_hubert("wav2vec2", "wav2vec 2.0", Wav2Vec2Model)
_like_hubert("wavlm", "WavLM", WavLMModel)
_like_hubert("data2vec-audio", "data2vec audio", Data2VecAudioModel)
_like_hubert("unispeech", "UniSpeech", UniSpeechModel)
_like_hubert("unispeech-sat", "UniSpeech-SAT", UniSpeechSatModel)


@FAMILIES.register("whisper", prefixes=("model.encoder.", "encoder."), takes_waveforms=False)
def _whisper(name, config, weights, normalize, pad=False):
    return WhisperTeacher(name, loaded(WhisperEncoder, config, weights, name), pad)


def _normalizes(folder: Path, optional: bool) -> bool | None:
    """Check the sampling rate, and return whether the model takes waveforms of zero mean and unit variance.

    Args:
        folder: of the model.
        optional: whether the folder may leave it open, because the model computes a spectrogram.
    """
    file, extractor = "preprocessor_config.json", None
    if (folder / file).is_file():
        extractor = _read_json(folder, file)
    elif (folder / "processor_config.json").is_file():  # where transformers 5 writes all parts of a processor
        file = "processor_config.json"
        extractor = _read_json(folder, file).get("feature_extractor")
    if not isinstance(extractor, dict):
        if optional:
            return None
        raise InputError(
            f"task.teacher={folder} has no preprocessor_config.json, and no processor_config.json with a"
            ' feature_extractor; write the first: {"do_normalize": true} if the model was trained on waveforms of zero'
            ' mean and unit variance, as those with "feat_extract_norm": "layer" in config.json are, else'
            ' {"do_normalize": false}'
        )
    if extractor.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise InputError(
            f"task.teacher={folder} takes sampling_rate={extractor['sampling_rate']} in its {file}; give a model for"
            f" {SAMPLE_RATE}"
        )
    normalize = extractor.get("do_normalize")
    if not optional and not isinstance(normalize, bool):
        raise InputError(
            f"{folder}/{file} has do_normalize={normalize}; say true where the model was"
            " trained on waveforms of zero mean and unit variance, else false"
        )
    return normalize


def _read_json(folder: Path, file: str) -> dict:
    path = folder / file
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {_instead_of(folder)}") from None
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} cannot be read as JSON; save the model again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; save the model again")
    return content


def _instead_of(folder: Path) -> str:
    """Return advice for a folder without config.json, which depends on its other files."""
    if (folder / "adapter_config.json").is_file():
        return (
            "the folder has an adapter without its model; load both with peft, and save what merge_and_unload() returns"
        )
    inside = [path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in folder.glob(pattern)]
    inside += folder.glob("*.pt")  # such as fairseq's
    if inside:
        return f"give one of these in the folder: {', '.join(sorted(map(str, inside))[:5])}"
    return "task.teacher takes a folder that transformers' save_pretrained wrote, or a file"


def loaded(
    architecture: type[PreTrainedModel], fields: Mapping[str, Any], weights: Mapping[str, Tensor], name: str
) -> Any:
    """Return one of transformers' models with its weights, frozen, in eval mode; see `build` and `load_weights`."""
    with input_errors(f"{name}/config.json describes no {architecture.__name__}"):
        model = build(architecture, fields)
    load_weights(model, weights, name)
    return model


def build(architecture: Any, fields: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model without weights, which takes no memory whatever its size.

    Args:
        architecture: the class of one of transformers' models.
        fields: of its configuration. Unknown fields are left out, also those that could load something else, such
            as auto_map.

    Raises:
        Exception: whatever transformers raises for fields that describe no such model.
    """
    known = architecture.config_class().to_dict()
    fields = {field: value for field, value in fields.items() if field in known}
    config = architecture.config_class.from_dict(fields)
    layers = getattr(config, "encoder_layers", config.num_hidden_layers)
    if not 1 <= layers <= MOST_LAYERS:
        raise InputError(f"{layers} layers, instead of 1 to {MOST_LAYERS}")
    with torch.device("meta"):
        model = architecture(config)
    setattr(model, MASK_EMBEDDING, None)
    return model


def _read_weights(folder: Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Return the encoder's tensors, from one file or from several with their index."""
    for form in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{form}.index.json"
        if index.is_file() or (folder / form).is_file():
            break
    else:
        raise InputError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin, and torch reads no other weights; load the"
            " model with transformers, whose save_pretrained writes the first"
        )
    files = [form]
    if index.is_file():
        shards = _read_json(folder, index.name).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index} has no weight_map; save the model again")
        files = sorted({Path(str(file)).name for file in shards.values()})
    weights = {}
    for file in files:
        weights.update(_read_tensors(folder / file))
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in weights)), "")
    weights = {key[len(prefix) :]: tensor for key, tensor in weights.items() if key.startswith(prefix)}
    weights.pop(MASK_EMBEDDING, None)
    return todays_names(weights)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing; copy it from the source of the folder")
    check_fetched(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, ValueError, SafetensorError):
            raise InputError(f"{path} is damaged or no safetensors file; copy it again") from None
    try:
        tensors = read_torch_file(path)
    except DamagedCheckpoint:
        raise InputError(f"{path} is damaged or not a file that torch saved; copy it again") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds no weights by name; copy it again")
    return {str(key): tensor for key, tensor in tensors.items()}


def todays_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with today's names for the two parts of a weight norm."""
    weights = dict(weights)
    for old, new in WEIGHT_NORM.items():
        if f"encoder.{old}" in weights:
            weights[f"encoder.{new}"] = weights.pop(f"encoder.{old}")
    return weights
