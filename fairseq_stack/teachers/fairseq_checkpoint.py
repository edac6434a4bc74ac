"""Teachers from fairseq checkpoints: HuBERT, wav2vec 2.0 and data2vec audio, which share one encoder."""

from types import SimpleNamespace

import torch

from fairseq_stack.checkpoint import configurations, load_checkpoint
from fairseq_stack.data.waveforms import normalize_waveforms
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.lengths import frames_from_samples
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.teachers.base import Teacher, exact_fp32, load_weights

# What the pre-training loss needs and feature extraction does not, for each `cfg.model._name`.
PRETRAINING_ONLY = {
    "hubert": ("mask_emb", "final_proj.", "label_embs_concat", "target_glu."),
    "wav2vec2": ("mask_emb", "final_proj.", "quantizer.", "project_q.", "target_glu."),
    "data2vec_audio": ("mask_emb", "final_proj.", "_ema"),
}

# The base models' shape, for the fields that an older checkpoint leaves to their defaults.
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
}
NO_TRAINING = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "feature_grad_mult": 1.0,
}


class FairseqTeacher(Teacher):
    """fairseq's HuBERT, wav2vec 2.0 or data2vec audio: post-norm (base) or pre-norm (large).

    Args:
        name: where it comes from.
        model_cfg: fairseq's configuration of the model, with `_name` and the fields of BASE_SHAPE.
        normalize: whether the pre-training normalised the waveforms.
        weights: state dict of fairseq's model.

    Raises:
        InputError: weights are missing, left over or of another shape.
    """

    def __init__(self, name, model_cfg, normalize, weights):
        self.name = name
        self.normalize = normalize
        shape = {field: model_cfg.get(field, default) for field, default in BASE_SHAPE.items()}
        with input_errors(f"task.teacher={name} has a cfg that describes no model"):
            self.model = HubertEncoder(SimpleNamespace(**shape, **NO_TRAINING))
        unused = PRETRAINING_ONLY[model_cfg["_name"]]
        load_weights(self.model, {key: weights[key] for key in weights if not key.startswith(unused)}, name)
        self.depth = len(self.model.encoder.layers)
        self.width = self.model.encoder.embedding_dim
        self.conv_layers = self.model.conv_layers

    @torch.no_grad()
    @exact_fp32()
    def cnn_features(self, waveforms, lengths):
        """[B, S] samples and [B] lengths to the CNN's features [B, C, T], for a student that shares the CNN."""
        self.model.to(waveforms.device)
        waveforms = waveforms.float()
        if self.normalize:
            waveforms = normalize_waveforms(waveforms, lengths)
        return self.model.features(waveforms, lengths)

    @torch.no_grad()
    @exact_fp32()
    def hidden_states(self, waveforms, lengths, layers, features=None):
        """See Teacher; `features` are those of `cnn_features`, if they are at hand."""
        if features is None:
            features = self.cnn_features(waveforms, lengths)
        hidden_states, _ = self.model.encode(features, lengths, range(self.depth), upto=max(layers))
        return {layer: hidden_states[layer] for layer in layers}

    def frames(self, samples):
        return frames_from_samples(samples, self.conv_layers)


def load_fairseq_teacher(path):
    """Load a checkpoint of fairseq's pre-training without running code from it.

    Raises:
        InputError: not a checkpoint, another kind of model, no `cfg` (early fairseq wrote a pickled
            Namespace instead), needs code to unpickle, or weights do not fit.
    """
    state = load_checkpoint(path)
    model_cfg, task_cfg = configurations(state)
    if model_cfg is None:
        raise InputError(
            f"task.teacher={path} has no cfg, which early versions of fairseq did not write; load it with"
            " today's fairseq where you trust it, and save it from there"
        )
    family, normalize = model_cfg.get("_name"), task_cfg.get("normalize", False)
    if not isinstance(family, str) or family not in PRETRAINING_ONLY:
        raise InputError(
            f"task.teacher={path} holds a model of the kind {family}; give one of"
            f" {', '.join(PRETRAINING_ONLY)}"
        )
    if not isinstance(normalize, bool):
        raise InputError(f"task.teacher={path} has task.normalize={normalize}, neither true nor false; it is damaged")
    return FairseqTeacher(str(path), model_cfg, normalize, state["model"])
