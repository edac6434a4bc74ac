"""Teachers from the state dicts of torchaudio's bundles, through transformers' models.

A state dict gives only the shapes of a model's weights. torchaudio.pipelines gives the rest: in its bundles of HuBERT,
wav2vec 2.0 and WavLM, all other fields depend on these shapes.
"""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import HubertModel, WavLMModel

from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON
from fairseq_stack.teachers.base import load_weights
from fairseq_stack.teachers.huggingface import HuggingFaceTeacher, build, todays_names

HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # by width
STRIDES: dict[tuple[int, ...], tuple[int, ...]] = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}  # by kernels
BUCKET_DISTANCE = 800  # WavLM's
# Prefixes that torchaudio's wrappers of its Wav2Vec2Model add: distributed training, normalisation, pre-training.
WRAPPERS = re.compile(r"^(module\.)?(model\.)?(wav2vec2\.)?")
# The modules that recognition and pre-training add.
HEAD = ("aux.", "mask_generator.", "logit_generator.")


def torchaudio_teacher(name: str, weights: Mapping[str, Tensor]) -> HuggingFaceTeacher:
    """Return a teacher from the state dict of a bundle's model, with or without the head for recognition.

    Args:
        name: the file that it comes from.
        weights: {torchaudio's name: tensor}.

    Raises:
        InputError: no bundle has these shapes, or a weight is missing or left over.
    """
    weights = {WRAPPERS.sub("", str(key)): tensor for key, tensor in weights.items()}
    weights = {_renamed(key): tensor for key, tensor in weights.items() if not key.startswith(HEAD)}
    with input_errors(f"task.teacher={name} has torchaudio's names of weights, but no bundle's shapes"):
        weights = todays_names(_separated(weights))
        fields = _fields(weights)
        is_wavlm = "num_buckets" in fields
        model = build(WavLMModel if is_wavlm else HubertModel, fields)
    load_weights(model, weights, name)
    # Exactly the models that were trained on normalised waveforms have layer norms in the CNN.
    normalize = fields["feat_extract_norm"] == "layer"
    family = "WavLM" if is_wavlm else "HuBERT or wav2vec 2.0"
    return HuggingFaceTeacher(name, family, model, normalize, FAIRSEQ_EPSILON)


def _renamed(key: str) -> str:
    """Return transformers' name of a weight. Modules have the same names there, but another nesting."""
    for theirs, ours in (("encoder.feature_projection.", "feature_projection."), ("encoder.transformer.", "encoder.")):
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
    # WavLM's attention wraps torch's attention.
    return key.replace(".attention.attention.", ".attention.")


def _separated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split WavLM's matrix of queries, keys and values, which torch's attention keeps as one, into three."""
    separated = {}
    for key, tensor in weights.items():
        if ".attention.in_proj_" in key:
            for part, values in zip("qkv", tensor.chunk(3)):
                separated[key.replace("in_proj_", f"{part}_proj.")] = values
        else:
            separated[key] = tensor
    return separated


def _fields(weights: Mapping[str, Tensor]) -> dict:
    """Return the fields of transformers' configuration of the model."""

    def shape(key: str) -> tuple[int, ...]:
        return tuple(weights[key].shape)

    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for match in (re.match(pattern, key) for key in weights) if match)

    convolutions = range(count(r"feature_extractor\.conv_layers\.(\d+)\."))
    convolutions = [shape(f"feature_extractor.conv_layers.{number}.conv.weight") for number in convolutions]
    kernels = tuple(kernel for _, _, kernel in convolutions)
    width = shape("feature_projection.projection.weight")[0]
    _, inputs, positions = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1")
    if kernels not in STRIDES:
        raise InputError(f"the kernels of its CNN are {kernels}")
    if width not in HEADS:
        raise InputError(f"its width is {width}, and theirs are {', '.join(map(str, HEADS))}")
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in weights
    fields = {
        "feat_extract_norm": "layer" if layer_norms else "group",
        "conv_dim": tuple(channels for channels, _, _ in convolutions),
        "conv_kernel": kernels,
        "conv_stride": STRIDES[kernels],
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in weights,
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        "num_hidden_layers": count(r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": HEADS[width],
        "do_stable_layer_norm": layer_norms,
        "num_conv_pos_embeddings": positions,
        "num_conv_pos_embedding_groups": width // inputs,
    }
    buckets = "encoder.layers.0.attention.rel_attn_embed.weight"
    if buckets in weights:
        fields.update(num_buckets=shape(buckets)[0], max_bucket_distance=BUCKET_DISTANCE)
    return fields
