"""A student as a file that s3prl's `distiller_local` loads, with its prediction heads."""

import contextlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS, ONE_BY_ONE, Outputs
from fairseq_stack.export.limits import (
    check_format_holds,
    frames_of_20_ms,
    has_heads,
    heads_on_the_last_layer,
    no_biases_in_the_cnn,
    no_norm_behind_the_cnn,
    post_norm,
    waveforms_as_recorded,
)
from fairseq_stack.export.plain import head_tensors, heads_on_top

_SHAPE = (
    "extractor_mode",
    "conv_pos",
    "conv_pos_groups",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "activation_fn",
    "layer_norm_first",
    "dropout",
    "attention_dropout",
    "activation_dropout",
)


def export_distiller(student: Student, file: str | Path) -> None:
    """Write the student as s3prl's DistilHuBERT training would: tensors and plain values in two entries.

    `s3prl.hub.distiller_local(ckpt=file)` loads it. Its first hidden state is the projection of the CNN, before
    the positional embedding is added. The layers of the student follow, then the predictions of the heads.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: s3prl's distiller cannot hold the student; names the field.
    """
    check_format_holds(student, "s3prl-distiller")
    layers = heads_on_top(student)
    first, second = zip(*(_as_two_maps(head_tensors(student, layer)) for layer in layers))
    inner, outer = first[0][0].size(0), second[0][0].size(0)
    output = {
        "output_layer.0.weight": torch.cat([weight for weight, _ in first]),
        "output_layer.0.bias": torch.cat([bias for _, bias in first]),
    }
    if len(layers) == 1:
        output["output_layer.2.layer.weight"], output["output_layer.2.layer.bias"] = second[0]
    else:
        output["output_layer.2.weight"] = torch.stack([weight.T for weight, _ in second])
        output["output_layer.2.bias"] = torch.stack([bias for _, bias in second])[None, None]
    torch.save(
        {
            "Config": {
                "distiller": {
                    **{field: student.config[field] for field in _SHAPE},
                    # s3prl evaluates this string: write it from the parsed layers.
                    "extractor_conv_feature_layers": str(student.conv_layers),
                    "encoder_layers": student.depth,
                    "task_emb_type": "expand-last",
                    "out_layer_type": "expand-last",
                    "out_layer_inter_dim": inner,
                    "final_dim": outer,
                    "n_tasks": len(layers),
                    "pred_layer_id": layers,
                }
            },
            "Distiller": {**student.weights, **output},
        },
        file,
    )


def _as_two_maps(maps: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A head as s3prl has it, two linear maps with a GELU between them: [(weight, bias), (weight, bias)].

    A linear head passes the GELU unchanged, because GELU(x) - GELU(-x) = x.
    """
    if len(maps) == 2:
        return maps
    ((weight, bias),) = maps
    width = weight.size(1)
    identity = torch.eye(width)
    return [
        (torch.cat([identity, -identity]), torch.zeros(2 * width)),
        (torch.cat([weight, -weight], dim=1), bias),
    ]


@FORMATS.register(
    "s3prl-distiller",
    write=export_distiller,
    help="a file for s3prl's distiller_local, with the prediction heads; its first hidden state comes before the"
    " positions",
    group_norm=f"in s3prl the group norm of extractor_mode=default runs over the padding too: {ONE_BY_ONE}",
    limits=(
        no_norm_behind_the_cnn,
        no_biases_in_the_cnn,
        post_norm,
        waveforms_as_recorded,
        has_heads,
        heads_on_the_last_layer,
        frames_of_20_ms,
    ),
)
def load_distiller(file: str | Path, student: Student) -> Outputs:
    """Load an export with s3prl's distiller_local; returns hidden states and predictions as a function of waveforms.

    Args:
        file: what export_distiller wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {1: [B, T, D], ..., depth: [B, T, D], "head 4": [B, T, teacher width], ...}.

    Raises:
        InputError: s3prl is not installed.
    """
    try:
        from s3prl.upstream.distiller.hubconf import distiller_local
    except ImportError as error:  # it imports distutils, which only setuptools has from Python 3.12 on
        raise InputError(
            f"s3prl's distiller cannot be imported ({error}); install espnet-s3prl and setuptools"
        ) from None
    with contextlib.redirect_stdout(sys.stderr):  # it prints its settings
        upstream = distiller_local(ckpt=str(file)).eval()
    names = [*range(1, student.depth + 1), *(f"head {layer}" for layer in heads_on_top(student))]
    return lambda waveforms: dict(zip(names, upstream(waveforms)["hidden_states"][1:]))
