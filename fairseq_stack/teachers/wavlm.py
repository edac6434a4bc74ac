"""WavLM from Microsoft's own files, through transformers' model."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import WavLMModel

from fairseq_stack.errors import input_errors
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.teachers.base import load_weights
from fairseq_stack.teachers.huggingface import HuggingFaceTeacher, build, todays_names

# Pairs of Microsoft's name (fairseq's, and three of its own) and transformers' name; # stands for a number.
NAMES = (
    ("feature_extractor.conv_layers.#.0.", "feature_extractor.conv_layers.#.conv."),
    ("feature_extractor.conv_layers.#.2.1.", "feature_extractor.conv_layers.#.layer_norm."),
    ("feature_extractor.conv_layers.#.2.", "feature_extractor.conv_layers.#.layer_norm."),
    ("layer_norm.", "feature_projection.layer_norm."),
    ("post_extract_proj.", "feature_projection.projection."),
    ("encoder.pos_conv.0.", "encoder.pos_conv_embed.conv."),
    ("encoder.layers.#.self_attn.grep_linear.", "encoder.layers.#.attention.gru_rel_pos_linear."),
    ("encoder.layers.#.self_attn.grep_a", "encoder.layers.#.attention.gru_rel_pos_const"),
    ("encoder.layers.#.self_attn.relative_attention_bias.", "encoder.layers.#.attention.rel_attn_embed."),
    ("encoder.layers.#.self_attn.", "encoder.layers.#.attention."),
    ("encoder.layers.#.self_attn_layer_norm.", "encoder.layers.#.layer_norm."),
    ("encoder.layers.#.fc1.", "encoder.layers.#.feed_forward.intermediate_dense."),
    ("encoder.layers.#.fc2.", "encoder.layers.#.feed_forward.output_dense."),
)


def wavlm_teacher(
    name: str, config: Mapping[str, Any], normalize: bool, weights: Mapping[str, Tensor], epsilon: float
) -> HuggingFaceTeacher:
    """Return a teacher from the configuration and the weights in one of Microsoft's files.

    Args:
        name: the file that it comes from.
        config: Microsoft's fields of the model, with fairseq's names.
        normalize: whether its training normalised the waveforms.
        weights: state dict of Microsoft's model.
        epsilon: see normalize_waveforms.

    Raises:
        InputError: the configuration describes no WavLM, or the weights do not fit it.
    """
    with input_errors(f"task.teacher={name} has a cfg that describes no WavLM"):
        channels, kernels, strides = zip(*parse_conv_layers(config["conv_feature_layers"]))
        fields = {
            "feat_extract_norm": {"default": "group", "layer_norm": "layer"}[config["extractor_mode"]],
            "conv_dim": channels,
            "conv_kernel": kernels,
            "conv_stride": strides,
            "conv_bias": config["conv_bias"],
            "hidden_size": config["encoder_embed_dim"],
            "intermediate_size": config["encoder_ffn_embed_dim"],
            "num_hidden_layers": config["encoder_layers"],
            "num_attention_heads": config["encoder_attention_heads"],
            "hidden_act": config["activation_fn"],
            "do_stable_layer_norm": config["layer_norm_first"],
            "num_conv_pos_embeddings": config["conv_pos"],
            "num_conv_pos_embedding_groups": config["conv_pos_groups"],
            "num_buckets": config["num_buckets"],
            "max_bucket_distance": config["max_distance"],
        }
        model = build(WavLMModel, fields)
    named = {_renamed(str(key)): tensor for key, tensor in weights.items() if key != "mask_emb"}
    load_weights(model, todays_names(named), name)
    return HuggingFaceTeacher(name, "WavLM", model, normalize, epsilon)


def _renamed(key: str) -> str:
    for theirs, ours in NAMES:
        pattern = re.escape(theirs).replace(re.escape("#"), r"(\d+)")
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", ours.replace("#", r"\1"), key)
    return key
