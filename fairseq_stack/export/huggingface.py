"""A student as a folder that transformers' HubertModel loads."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoFeatureExtractor, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.export.formats import FORMATS, ONE_BY_ONE, Outputs
from fairseq_stack.export.verify import ExportMismatch
from fairseq_stack.models.waveform_norm import TRANSFORMERS_EPSILON

logger = logging.getLogger(__name__)

# transformers' own default, for fine-tuning with masks (SpecAugment).
MASK_TIME_PROB = 0.05

# fairseq's names on the left, transformers' on the right.
NORMS = {"default": "group", "layer_norm": "layer"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "tanh": "tanh",
    "linear": "linear",
}
_MODULES = {
    "layer_norm": "feature_projection.layer_norm",
    "post_extract_proj": "feature_projection.projection",
    "encoder.pos_conv.0": "encoder.pos_conv_embed.conv",
    "encoder.layer_norm": "encoder.layer_norm",
}
_LAYER_MODULES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
    "final_layer_norm": "final_layer_norm",
}
_PARAMETERS = {
    "weight": "weight",
    "bias": "bias",
    # fairseq uses torch's first weight norm, transformers its successor.
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def export_huggingface(student: Student, folder: str | Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    `transformers.HubertModel.from_pretrained(folder)` and s3prl's `hf_hubert_custom` load the folder.
    With the preprocessor a single utterance gives the features of training, if training normalised with transformers'
    epsilon or not at all. So does a padded batch, unless the CNN has a group norm (`extractor_mode=default`):
    transformers takes its statistics over the padding too. Give such a student utterances of one length, or one at
    a time.

    Args:
        student: a Student.
        folder: where to write; made if it is missing.
    """
    model = HubertModel(_config(student))
    model.load_state_dict(_weights(student), strict=True)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=student.normalize,
        # The student has never attended to padding, so a batch needs an attention mask.
        return_attention_mask=True,
    ).save_pretrained(folder)


@FORMATS.register(
    "huggingface",
    write=export_huggingface,
    help="a folder for transformers.HubertModel and s3prl's hf_hubert_custom",
    group_norm="in transformers the group norm of extractor_mode=default runs over the padding too, with or without an"
    f" attention mask (s3prl's hf_hubert gives one): {ONE_BY_ONE}",
    normalizer=("transformers", TRANSFORMERS_EPSILON),
)
def load_huggingface(folder: str | Path, student: Student) -> Outputs:
    """Load an export with transformers; returns its hidden states as a function of waveforms.

    Args:
        folder: what export_huggingface wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}. It calls preprocessor and model as the
        model card does. The last of them is last_hidden_state.

    Raises:
        ExportMismatch: transformers finds missing or unexpected keys, or loads another mask embedding.
    """
    model, report = HubertModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  a pair, with loading info
        folder, local_files_only=True, output_loading_info=True
    )
    problems = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if problems:
        raise ExportMismatch(f"transformers does not load all of the export: {problems}")
    if student.mask_emb is not None and not torch.equal(model.masked_spec_embed, student.mask_emb):
        raise ExportMismatch("transformers loads another mask embedding than the student's")
    model.eval()
    preprocess = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)

    named = False

    def outputs(waveforms: list[torch.Tensor]) -> dict[int | str, torch.Tensor]:
        nonlocal named
        samples = [waveform.numpy() for waveform in waveforms]
        inputs = preprocess(samples, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        output = model(**inputs, output_hidden_states=True)
        *states, last = output.hidden_states
        if not named and student.config["layer_norm_first"] and not torch.equal(last, output.last_hidden_state):
            named = True
            logger.warning(
                f"transformers {transformers.__version__} leaves the final layer norm out of hidden_states[-1];"
                " last_hidden_state has it, and transformers before 5.0 and from 5.18 on have it in both"
            )
        return dict(enumerate([*states, output.last_hidden_state]))

    return outputs


def _config(student: Student) -> HubertConfig:
    config = student.config
    channels, kernels, strides = zip(*student.conv_layers)
    return HubertConfig(
        feat_extract_norm=NORMS[config["extractor_mode"]],
        conv_dim=channels,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=config["conv_bias"],
        feat_proj_layer_norm=config.get("feature_layer_norm", True),
        hidden_size=config["encoder_embed_dim"],
        intermediate_size=config["encoder_ffn_embed_dim"],
        num_hidden_layers=student.depth,
        num_attention_heads=config["encoder_attention_heads"],
        hidden_act=ACTIVATIONS[config["activation_fn"]],
        do_stable_layer_norm=config["layer_norm_first"],
        num_conv_pos_embeddings=config["conv_pos"],
        num_conv_pos_embedding_groups=config["conv_pos_groups"],
        hidden_dropout=config["dropout"],
        attention_dropout=config["attention_dropout"],
        activation_dropout=config["activation_dropout"],
        feat_proj_dropout=config["dropout_input"],
        layerdrop=0.0,
        # transformers only has a mask embedding if this is above 0, and masks in training only. A student that was
        # trained without masks has none.
        mask_time_prob=0.0 if student.mask_emb is None else MASK_TIME_PROB,
        mask_feature_prob=0.0,
        # Without this, transformers from version 5 on leaves the final layer norm of a pre-norm encoder out of
        # hidden_states[-1]. Earlier versions, fairseq and s3prl include it. Versions 5.0 to 5.17 do not read the field.
        tie_last_hidden_states=True,  # pyright: ignore[reportCallIssue]  configurations take any field
    )


def _weights(student: Student) -> dict[str, torch.Tensor]:
    """The student's tensors under transformers' names."""
    names = transformers_names(student.weights, len(student.conv_layers), student.depth)
    weights = {names[name]: tensor for name, tensor in student.weights.items()}
    if student.mask_emb is not None:
        weights["masked_spec_embed"] = student.mask_emb
    width = student.config["encoder_embed_dim"]
    if student.conv_layers[-1][0] == width:
        # If the widths are equal, fairseq has no projection, but transformers always has one.
        weights["feature_projection.projection.weight"] = torch.eye(width)
        weights["feature_projection.projection.bias"] = torch.zeros(width)
    return weights


def transformers_names(names: Iterable[str], conv_layers: int, depth: int) -> dict[str, str]:
    """{fairseq's name of a tensor: transformers' name}, for a model with so many convolutions and layers."""
    modules = dict(_MODULES)
    for index in range(conv_layers):
        block = f"feature_extractor.conv_layers.{index}"
        modules[f"{block}.0"] = f"{block}.conv"
        # The norm comes third in fairseq's block; a layer norm there sits between two transpositions.
        modules[f"{block}.2"] = modules[f"{block}.2.1"] = f"{block}.layer_norm"
    for index in range(depth):
        layer = f"encoder.layers.{index}"
        modules.update({f"{layer}.{ours}": f"{layer}.{theirs}" for ours, theirs in _LAYER_MODULES.items()})
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{modules[module]}.{_PARAMETERS[parameter]}" for name, (module, _, parameter) in split.items()}
