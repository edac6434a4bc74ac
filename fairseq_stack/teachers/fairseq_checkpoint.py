"""HuBERT teachers from fairseq checkpoints."""

from types import SimpleNamespace

import torch

from fairseq_stack.checkpoint import load_checkpoint
from fairseq_stack.data.waveforms import normalize_waveforms
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import frames_from_samples
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.teachers.base import Teacher

# What the pre-training loss needs and feature extraction does not.
PRETRAINING_ONLY = ("mask_emb", "final_proj.", "label_embs_concat", "target_glu.")

# fairseq's HuBERT Base, for the fields that an older checkpoint leaves to their defaults.
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
}
NO_TRAINING = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "feature_grad_mult": 1.0,
}


class HubertTeacher(Teacher):
    """fairseq's HuBERT: post-norm (base) or pre-norm with normalised input (large, x-large).

    Args:
        name: where it comes from.
        model_cfg: fairseq's fields for the shape (those of BASE_SHAPE).
        normalize: whether the pre-training normalised the waveforms.
        weights: state dict of fairseq's HubertModel.

    Raises:
        InputError: weights are missing or left over.
    """

    def __init__(self, name, model_cfg, normalize, weights):
        self.name = name
        self.normalize = normalize
        self.model = HubertEncoder(SimpleNamespace(**{**BASE_SHAPE, **model_cfg, **NO_TRAINING}))
        weights = {key: value for key, value in weights.items() if not key.startswith(PRETRAINING_ONLY)}
        missing, left_over = self.model.load_state_dict(weights, strict=False)
        for keys, what in ((missing, "lacks"), (left_over, "has an unknown")):
            if keys:
                raise InputError(f"task.teacher={name} {what} weight {keys[0]} ({len(keys)} in all); is it a HuBERT?")
        self.model.float().eval().requires_grad_(False)
        self.depth = len(self.model.encoder.layers)
        self.width = self.model.encoder.embedding_dim

    @torch.no_grad()
    def hidden_states(self, waveforms, lengths, layers):
        self.model.to(waveforms.device)
        waveforms = waveforms.float()
        if self.normalize:
            waveforms = normalize_waveforms(waveforms, lengths)
        hidden_states, _ = self.model.encode(waveforms, lengths, range(self.depth), upto=max(layers))
        return {layer: hidden_states[layer] for layer in layers}

    def frames(self, samples):
        return frames_from_samples(samples, self.model.conv_layers)


def load_fairseq_teacher(path):
    """Load a HuBERT checkpoint of fairseq without running code from it.

    Raises:
        InputError: not a checkpoint, not a HuBERT, needs code to unpickle, or weights do not fit.
    """
    state = load_checkpoint(path)
    cfg = state.get("cfg")
    if not isinstance(state.get("model"), dict) or not cfg or cfg["model"].get("_name") != "hubert":
        raise InputError(f"task.teacher={path} is no fairseq HuBERT checkpoint; give a file with cfg.model._name=hubert")
    shape = {name: cfg["model"][name] for name in BASE_SHAPE if name in cfg["model"]}
    return HubertTeacher(str(path), shape, bool(cfg["task"].get("normalize", False)), state["model"])
