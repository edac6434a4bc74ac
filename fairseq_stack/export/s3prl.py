"""A student as a file that s3prl's `hubert_local` loads."""

import torch

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import samples_per_frame

# What s3prl's HuBERT upstream takes for granted.
_SAMPLES_PER_FRAME = 320

_MODEL_FIELDS = (
    "extractor_mode",
    "conv_bias",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "activation_fn",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
)


def export_s3prl(student, file):
    """Write the student in s3prl's own format: tensors and plain values in four entries.

    `s3prl.hub.hubert_local(ckpt=file)` loads it. An utterance on its own gives the features of training.
    In a padded batch s3prl rounds its frames up, so that it may attend to one frame of padding, and
    takes the statistics of a group norm (`extractor_mode=default`) over the padding too.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: the student's frames are not 20 ms apart, which s3prl's HuBERT takes for granted.
    """
    config, hop = student.config, samples_per_frame(student.conv_layers)
    if hop != _SAMPLES_PER_FRAME:
        raise InputError(
            f"model.conv_feature_layers={config['conv_feature_layers']} makes a frame of {hop} samples, and"
            f" s3prl's HuBERT takes {_SAMPLES_PER_FRAME} for granted; export it with --to huggingface"
        )
    width = config["encoder_embed_dim"]
    torch.save(
        {
            "task_cfg": {"sample_rate": SAMPLE_RATE, "normalize": student.normalize},
            "model_cfg": {
                **{field: config[field] for field in _MODEL_FIELDS},
                # s3prl evaluates this string: write it from the parsed layers.
                "conv_feature_layers": str(student.conv_layers),
                "encoder_layers": student.depth,
                "encoder_layerdrop": 0.0,
                "label_rate": SAMPLE_RATE / hop,
                "required_seq_len_multiple": 1,
                "final_dim": 1,
            },
            "model_weight": {
                **student.weights,
                # Parts of HuBERT's pretraining that s3prl builds and never uses.
                "mask_emb": torch.zeros(width),
                "final_proj.weight": torch.zeros(1, width),
                "final_proj.bias": torch.zeros(1),
            },
            # No labels, so no embeddings of labels.
            "dictionaries_symbols": [None],
        },
        file,
    )


def load_s3prl(file):
    """The hidden states of an export for s3prl, as a function of a waveform [S].

    Args:
        file: what export_s3prl wrote.

    Returns:
        a function from [S] to D + 1 times [1, T, D].

    Raises:
        InputError: s3prl is not installed.
    """
    try:
        from s3prl.upstream.hubert.hubconf import hubert_local
    except ImportError as error:
        raise InputError(f"s3prl cannot be imported ({error}); install espnet-s3prl beside fairseq") from None
    upstream = hubert_local(ckpt=str(file)).eval()
    # The upstream normalises by itself where the export says so.
    return lambda waveform: upstream([waveform])["hidden_states"]
