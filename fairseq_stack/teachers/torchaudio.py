"""Teachers from the state dicts of torchaudio's bundles, through transformers' models.

A state dict says no more of a model than the shapes of its weights. The rest is what torchaudio.pipelines says of the
bundles of HuBERT, wav2vec 2.0 and WavLM, in which it depends on the shapes.
"""

import re

from transformers import HubertModel, WavLMModel

from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON
from fairseq_stack.teachers.base import load_weights
from fairseq_stack.teachers.huggingface import HuggingFaceTeacher, build, todays_names

HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # by width
STRIDES = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}  # by kernels
BUCKET_DISTANCE = 800  # WavLM's
# In torchaudio's names around its Wav2Vec2Model: training in several processes, normalisation, and pre-training.
AROUND = re.compile(r"^(module\.)?(model\.)?(wav2vec2\.)?")
# What recognition and pre-training add.
HEAD = ("aux.", "mask_generator.", "logit_generator.")


def torchaudio_teacher(name, weights):
    """A teacher from the state dict of a bundle's model, with the head of recognition or not.

    Args:
        name: where it comes from.
        weights: {torchaudio's name: tensor}.

    Raises:
        InputError: the shapes are of no bundle, or a weight is missing or left over.
    """
    weights = {AROUND.sub("", str(key)): tensor for key, tensor in weights.items()}
    weights = {_renamed(key): tensor for key, tensor in weights.items() if not key.startswith(HEAD)}
    with input_errors(f"task.teacher={name} has torchaudio's names of weights, but is of no bundle"):
        weights = todays_names(_separated(weights))
        fields = _fields(weights)
        is_wavlm = "num_buckets" in fields
        model = build(WavLMModel if is_wavlm else HubertModel, fields)
    load_weights(model, weights, name)
    # All that were trained on normalised waveforms have layer norms in the CNN, and no others.
    normalize = fields["feat_extract_norm"] == "layer"
    family = "WavLM" if is_wavlm else "HuBERT or wav2vec 2.0"
    return HuggingFaceTeacher(name, family, model, normalize, FAIRSEQ_EPSILON)


def _renamed(key):
    """transformers' name: the modules are called as there, and nested in another way."""
    for theirs, ours in (("encoder.feature_projection.", "feature_projection."), ("encoder.transformer.", "encoder.")):
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
    # In WavLM, torch's attention is in torchaudio's.
    return key.replace(".attention.attention.", ".attention.")


def _separated(weights):
    """WavLM's queries, keys and values, which torch's attention keeps in one matrix."""
    separated = {}
    for key, tensor in weights.items():
        if ".attention.in_proj_" in key:
            for part, values in zip("qkv", tensor.chunk(3)):
                separated[key.replace("in_proj_", f"{part}_proj.")] = values
        else:
            separated[key] = tensor
    return separated


def _fields(weights):
    """transformers' configuration of the model."""

    def shape(key):
        return tuple(weights[key].shape)

    def count(pattern):
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
