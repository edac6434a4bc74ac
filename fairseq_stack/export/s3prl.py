"""A student as a file that s3prl's `hubert_local` loads."""

from pathlib import Path

import torch

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError
from fairseq_stack.export.fairseq import hubert_config, hubert_weights
from fairseq_stack.export.formats import FORMATS, ONE_BY_ONE, Outputs
from fairseq_stack.export.limits import check_format_holds, frames_of_20_ms, norm_behind_the_cnn
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON


def export_s3prl(student: Student, file: str | Path) -> None:
    """Write the student in s3prl's own format: tensors and plain values in four entries.

    `s3prl.hub.hubert_local(ckpt=file)` loads it. A single utterance gives the features of training. In a padded
    batch s3prl rounds its frames up, so it may attend to one frame of padding. It also takes the statistics of a
    group norm (`extractor_mode=default`) over the padding.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: s3prl's HuBERT cannot hold the student: its frames are not 20 ms apart, or it has no layer norm
            after the CNN.
    """
    check_format_holds(student, "s3prl")
    torch.save(
        {
            "task_cfg": {"sample_rate": SAMPLE_RATE, "normalize": student.normalize},
            "model_cfg": hubert_config(student),
            "model_weight": hubert_weights(student),
            # Without labels s3prl builds no label embeddings.
            "dictionaries_symbols": [None],
        },
        file,
    )


@FORMATS.register(
    "s3prl",
    write=export_s3prl,
    help="a file for s3prl's hubert_local",
    group_norm=f"in s3prl the group norm of extractor_mode=default runs over the padding too: {ONE_BY_ONE}",
    layer_norm=f"s3prl rounds the frames of a padded utterance up and attends to one frame of padding: {ONE_BY_ONE}",
    normalizer=("s3prl", FAIRSEQ_EPSILON),
    limits=(norm_behind_the_cnn, frames_of_20_ms),
)
def load_s3prl(file: str | Path, student: Student) -> Outputs:
    """Load an export with s3prl's hubert_local; returns its hidden states as a function of waveforms.

    Args:
        file: what export_s3prl wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}.

    Raises:
        InputError: s3prl is not installed.
    """
    try:
        from s3prl.upstream.hubert.hubconf import hubert_local
    except ImportError as error:
        raise InputError(
            f"s3prl cannot be imported ({error}); pip install espnet-s3prl, on Python 3.10 in an environment without"
            " fairseq"
        ) from None
    upstream = hubert_local(ckpt=str(file)).eval()
    # The upstream normalises by itself where the export says so.
    return lambda waveforms: dict(enumerate(upstream(waveforms)["hidden_states"]))
