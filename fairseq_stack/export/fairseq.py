"""A student as a checkpoint that fairseq's stock HubertModel loads, to fine-tune it with fairseq's own recipes."""

from pathlib import Path

import torch

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS, ONE_BY_ONE, Outputs
from fairseq_stack.export.limits import check_format_holds, norm_behind_the_cnn
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

# fairseq's defaults. Fine-tuning can only override fields that the checkpoint has.
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


def export_fairseq(student: Student, file: str | Path) -> None:
    """Write the student as fairseq's `hubert_pretraining` would save it, in tensors and plain values.

    To fine-tune it, set `model.w2v_path` of fairseq's `hubert_ctc` to the file and `task.normalize` to the student's.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: the student has no layer norm after the CNN, as HuBERT does.
    """
    check_format_holds(student, "fairseq")
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
            # Without labels fairseq builds a HubertModel without label embeddings, as fine-tuning expects.
            "task_state": {"dictionaries": [None]},
            # fairseq reads the progress of the training from every checkpoint.
            "optimizer_history": [
                {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
            ],
            "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        },
        file,
    )


def hubert_config(student: Student) -> dict:
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


def hubert_weights(student: Student) -> dict[str, torch.Tensor]:
    """The student's tensors, and those of HuBERT's pre-training that fairseq and s3prl build but do not use here."""
    width = student.config["encoder_embed_dim"]
    return {
        **student.weights,
        # A student trained without masks has no mask embedding; fine-tuning with masks learns one from zero.
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
def load_fairseq(file: str | Path, student: Student) -> Outputs:
    """Load an export with fairseq; returns its hidden states as a function of waveforms.

    Args:
        file: what export_fairseq wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}.

    Raises:
        InputError: fairseq is not installed.
        ExportMismatch: the mask embedding that fairseq loads is not the student's.
    """
    try:
        import fairseq.models.hubert  # noqa: F401  registers the model and its task
        from fairseq.checkpoint_utils import load_model_ensemble_and_task
    except ImportError as error:
        raise InputError(f"--to fairseq: fairseq, which verifies this export, cannot be imported ({error})") from None
    (model,), _, _ = load_model_ensemble_and_task([str(file)], strict=True)
    if student.mask_emb is not None and not torch.equal(model.mask_emb, student.mask_emb):
        raise ExportMismatch("fairseq loads another mask embedding than the student's")
    model.eval()

    def outputs(waveforms: list[torch.Tensor]) -> dict[int | str, torch.Tensor]:
        # fairseq's datasets normalise each waveform by F.layer_norm, before padding.
        inputs, lengths = padded_batch(waveforms, FAIRSEQ_EPSILON if student.normalize else None)
        padding = torch.arange(inputs.size(1)) >= lengths[:, None]
        states, hooks = [], []
        layers = model.encoder.layers
        hooks.append(layers[0].register_forward_pre_hook(lambda layer, args: states.append(args[0].transpose(0, 1))))
        for layer in layers[:-1]:  # the last state is the model's output, after a pre-norm encoder's final norm
            hooks.append(layer.register_forward_hook(lambda layer, args, out: states.append(out[0].transpose(0, 1))))
        states.append(model.extract_features(inputs, padding_mask=padding)[0])
        for hook in hooks:
            hook.remove()
        return dict(enumerate(states))

    return outputs
