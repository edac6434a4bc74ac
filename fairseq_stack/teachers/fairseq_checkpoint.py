"""Teachers with HuBERT's encoder: HuBERT, related models with the same encoder, and students of this package."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.models.pos_conv import with_batch_norm
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON, normalize_waveforms
from fairseq_stack.teachers.base import CnnTeacher, exact_fp32, load_weights

# For each model's name in fairseq: its usual name, and the weights that only its training needs.
HUBERTS = ("mask_emb", "final_proj.", "label_embs_concat", "target_glu.")
FAMILIES = {
    "hubert": ("HuBERT", HUBERTS),
    "wav2vec2": ("wav2vec 2.0", ("mask_emb", "final_proj.", "quantizer.", "project_q.", "target_glu.")),
    "data2vec_audio": ("data2vec audio", ("mask_emb", "final_proj.", "_ema")),
    "contentvec": ("ContentVec", (*HUBERTS, "layer_proj.", "encoder.cond_layer_norm.")),
    "unispeech_sat": ("UniSpeech-SAT", HUBERTS),
    "distiller": ("DistilHuBERT", ("output_layer.",)),
    "stacked_hubert": ("student of fairseq_stack", ()),
}
# The base models' shape: the defaults of fields that older checkpoints lack.
BASE_SHAPE = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "feature_layer_norm": True,
}
NO_TRAINING = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "feature_grad_mult": 1.0,
}


class FairseqTeacher(CnnTeacher):
    """A model of FAMILIES: post-norm (base) or pre-norm (large).

    Args:
        name: the file that it comes from.
        config: fairseq's configuration of the model, with `_name` and the fields of BASE_SHAPE.
        normalize: whether its training normalised the waveforms.
        weights: state dict of fairseq's model.
        epsilon: see normalize_waveforms.

    Raises:
        InputError: the model is of another kind, or weights are missing, left over or of another shape.
    """

    model: HubertEncoder
    epsilon: float

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        normalize: bool,
        weights: Mapping[str, Tensor],
        epsilon: float = FAIRSEQ_EPSILON,
    ) -> None:
        self.name = name
        self.normalize = normalize
        self.epsilon = epsilon
        if config["_name"] not in FAMILIES:
            raise InputError(
                f"task.teacher={name} holds a model of the kind {config['_name']}; give one of {', '.join(FAMILIES)},"
                " wavlm or a fine-tuned one of them"
            )
        if config.get("layer_type", "transformer") != "transformer":
            raise InputError(
                f"task.teacher={name} has model.layer_type={config['layer_type']}; give a model whose layers are of the"
                " kind transformer"
            )
        self.family, unused = FAMILIES[config["_name"]]
        shape = {field: config.get(field, default) for field, default in BASE_SHAPE.items()}
        with input_errors(f"task.teacher={name} has a cfg that describes no model"):
            self.model = HubertEncoder(SimpleNamespace(**shape, **NO_TRAINING))
        if config.get("conv_pos_batch_norm", False):  # mHuBERT at 25 Hz of fairseq's textless NLP
            self.model.encoder.pos_conv = with_batch_norm(self.model.encoder.pos_conv)
        if config["_name"] == "contentvec":
            # Its last layers, after those that give its representation, are used in its training only.
            unused = (*unused, *_layers_from(shape["encoder_layers"], weights))
        load_weights(self.model, {key: weights[key] for key in weights if not str(key).startswith(unused)}, name)
        self.depth = len(self.model.encoder.layers)
        self.width = self.model.encoder.embedding_dim
        self.conv_layers = self.model.conv_layers

    @torch.no_grad()
    @exact_fp32()
    def cnn_features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        self.model.to(waveforms.device)
        waveforms = waveforms.float()
        if self.normalize:
            waveforms = normalize_waveforms(waveforms, lengths, self.epsilon)
        return self.model.features(waveforms, lengths)

    @torch.no_grad()
    @exact_fp32()
    def hidden_states(
        self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int], features: Tensor | None = None
    ) -> dict[int, Tensor]:
        if features is None:
            features = self.cnn_features(waveforms, lengths)
        hidden_states, _ = self.model.encode(features, lengths, range(self.depth), upto=max(layers))
        return {layer: hidden_states[layer] for layer in layers}

    def frames(self, samples: int) -> int:
        return frames_from_samples(samples, self.conv_layers)


def _layers_from(first: int, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes of the weights of layer number `first` and of all later ones."""
    numbers = {int(match[1]) for match in (re.match(r"encoder\.layers\.(\d+)\.", str(key)) for key in weights) if match}
    return [f"encoder.layers.{number}." for number in numbers if number >= first]
