"""A student as a checkpoint that fairseq's stock HubertModel loads, to fine-tune it with fairseq's own recipes."""

import torch

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS, ONE_BY_ONE
from fairseq_stack.export.limits import check, norm_behind_the_cnn
from fairseq_stack.export.verify import ExportMismatch, padded_batch
from fairseq_stack.models.conv_geometry import samples_per_frame
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON

_SHAPE = (
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

# fairseq's defaults. Fine-tuning overrides fields that a checkpoint has; one that is not there could not be set.
_TRAINING = {
    "encoder_layerdrop": 0.0,
    "dropout_features": 0.0,
    "feature_grad_mult": 1.0,
    "mask_length": 10,
    "mask_prob": 0.65,
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
}


def export_fairseq(student, file):
    """Write the student as fairseq's `hubert_pretraining` would save it, in tensors and plain values.

    `model.w2v_path` of fairseq's `hubert_ctc` takes the file; `task.normalize` has to be the student's there.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: the student has no layer norm behind the CNN, which HuBERT has.
    """
    check(student, "fairseq")
    torch.save(
        {
            "args": None,
            "cfg": {
                "model": {"_name": "hubert", **hubert_config(student), **_TRAINING},
                "task": {
                    "_name": "hubert_pretraining",
                    "data": "",
                    "labels": [],
                    "label_rate": hubert_config(student)["label_rate"],
                    "sample_rate": SAMPLE_RATE,
                    "normalize": student.normalize,
                },
            },
            "model": hubert_weights(student),
            # No labels. fairseq then builds a HubertModel without embeddings of labels, for fine-tuning.
            "task_state": {"dictionaries": [None]},
            # fairseq asks every checkpoint how far its training was.
            "optimizer_history": [
                {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
            ],
            "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        },
        file,
    )


def hubert_config(student):
    """The student's shape in the fields of fairseq's HubertConfig, which s3prl's HuBERT shares."""
    return {
        **{field: student.config[field] for field in _SHAPE},
        # fairseq and s3prl evaluate this string: write it from the parsed layers.
        "conv_feature_layers": str(student.conv_layers),
        "encoder_layers": student.depth,
        "encoder_layerdrop": 0.0,
        "label_rate": SAMPLE_RATE / samples_per_frame(student.conv_layers),
        "required_seq_len_multiple": 1,
        "final_dim": 1,
    }


def hubert_weights(student):
    """The student's tensors and those of HuBERT's pre-training that fairseq and s3prl build, and never use here."""
    width = student.config["encoder_embed_dim"]
    return {
        **student.weights,
        # Without masks in training there is nothing to hand over; fine-tuning with masks learns one from zero.
        "mask_emb": torch.zeros(width) if student.mask_emb is None else student.mask_emb,
        "final_proj.weight": torch.zeros(1, width),
        "final_proj.bias": torch.zeros(1),
    }


@FORMATS.register(
    "fairseq",
    write=export_fairseq,
    help="a checkpoint of fairseq's stock HubertModel, for model.w2v_path of hubert_ctc",
    group_norm=f"in fairseq the group norm of extractor_mode=default runs over the padding too: {ONE_BY_ONE}",
    layer_norm=f"fairseq rounds the frames of a padded utterance up and attends to one frame of padding: {ONE_BY_ONE}",
    normalizer=("fairseq", FAIRSEQ_EPSILON),
    limits=(norm_behind_the_cnn,),
)
def load_fairseq(file, student):
    """The hidden states of an export for fairseq, as a function of a list of waveforms.

    Args:
        file: what export_fairseq wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}.

    Raises:
        InputError: fairseq is not installed.
    """
    try:
        import fairseq.models.hubert  # noqa: F401  registers the model and its task
        from fairseq.checkpoint_utils import load_model_ensemble_and_task
    except ImportError as error:
        raise InputError(f"fairseq cannot be imported ({error}), and this export is verified in it") from None
    (model,), _, _ = load_model_ensemble_and_task([str(file)], strict=True)
    if student.mask_emb is not None and not torch.equal(model.mask_emb, student.mask_emb):
        raise ExportMismatch("fairseq loads another mask embedding than the student's")
    model.eval()

    def outputs(waveforms):
        # fairseq's datasets normalise each waveform by F.layer_norm, before padding.
        inputs, lengths = padded_batch(waveforms, FAIRSEQ_EPSILON if student.normalize else None)
        padding = torch.arange(inputs.size(1)) >= lengths[:, None]
        states, hooks = [], []
        layers = model.encoder.layers
        hooks.append(layers[0].register_forward_pre_hook(lambda layer, args: states.append(args[0].transpose(0, 1))))
        for layer in layers[:-1]:  # the last state is the model's output, behind the last norm of a pre-norm encoder
            hooks.append(layer.register_forward_hook(lambda layer, args, out: states.append(out[0].transpose(0, 1))))
        states.append(model.extract_features(inputs, padding_mask=padding)[0])
        for hook in hooks:
            hook.remove()
        return dict(enumerate(states))

    return outputs
