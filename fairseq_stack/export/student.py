"""Export the student of a checkpoint, verified on speech before it gets its name."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Optional, Tuple

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint, with_moving_average
from fairseq_stack.errors import InputError, check_choice, input_errors
from fairseq_stack.export.card import before_full_depth, model_card
from fairseq_stack.export.distiller import export_distiller, load_distiller
from fairseq_stack.export.fairseq import export_fairseq, load_fairseq
from fairseq_stack.export.huggingface import export_huggingface, load_huggingface
from fairseq_stack.export.onnx import export_onnx, load_onnx
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.s3prl import export_s3prl, load_s3prl
from fairseq_stack.export.verify import (
    check_output,
    padded_batch,
    read_speech,
    write_verified,
)
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON, TRANSFORMERS_EPSILON

logger = logging.getLogger(__name__)

_ONE_BY_ONE = "give it one utterance at a time, or use --to onnx"


@dataclass(frozen=True)
class Format:
    """How to write and load one, and why it cannot agree in a padded batch.

    Attributes:
        help: what it is for.
        write: (student, path) to nothing.
        load: (path, student) to a function from a list of [S] to {name: [B, T, D]}.
        group_norm: what a padded batch does to students with a group norm, and what to use; None for nothing.
        layer_norm: the same for students without one.
        normalizer: the library that normalises waveforms, and what it adds to their variance; None where the export
            does it as the training did.
    """

    help: str
    write: Callable
    load: Callable
    group_norm: Optional[str] = None
    layer_norm: Optional[str] = None
    normalizer: Optional[Tuple[str, float]] = None

    def padding(self, student):
        return self.group_norm if student.config["extractor_mode"] == "default" else self.layer_norm

    def normalization(self, student):
        """Why waveforms are not normalised as in training, or None where they are."""
        if not student.normalize or self.normalizer is None or self.normalizer[1] == student.normalize_epsilon:
            return None
        return (
            f"{self.normalizer[0]} adds {self.normalizer[1]:g} to the variance of a waveform, the training added"
            f" {student.normalize_epsilon:g} (task.normalize_epsilon), so features of quiet recordings differ"
        )


FORMATS = {
    "huggingface": Format(
        "a folder for transformers.HubertModel and s3prl's hf_hubert_custom",
        export_huggingface,
        load_huggingface,
        "in transformers the group norm of extractor_mode=default runs over the padding too, with or without an"
        f" attention mask (s3prl's hf_hubert gives one): {_ONE_BY_ONE}",
        normalizer=("transformers", TRANSFORMERS_EPSILON),
    ),
    "s3prl": Format(
        "a file for s3prl's hubert_local",
        export_s3prl,
        load_s3prl,
        f"in s3prl the group norm of extractor_mode=default runs over the padding too: {_ONE_BY_ONE}",
        f"s3prl rounds the frames of a padded utterance up and attends to one frame of padding: {_ONE_BY_ONE}",
        ("s3prl", FAIRSEQ_EPSILON),
    ),
    "s3prl-distiller": Format(
        "a file for s3prl's distiller_local, with the prediction heads; its first hidden state comes before the"
        " positions",
        export_distiller,
        load_distiller,
        f"in s3prl the group norm of extractor_mode=default runs over the padding too: {_ONE_BY_ONE}",
    ),
    "fairseq": Format(
        "a checkpoint of fairseq's stock HubertModel, for model.w2v_path of hubert_ctc",
        export_fairseq,
        load_fairseq,
        f"in fairseq the group norm of extractor_mode=default runs over the padding too: {_ONE_BY_ONE}",
        f"fairseq rounds the frames of a padded utterance up and attends to one frame of padding: {_ONE_BY_ONE}",
        ("fairseq", FAIRSEQ_EPSILON),
    ),
    "onnx": Format("a file for onnxruntime, for batches of any size and length", export_onnx, load_onnx),
}


def export(checkpoint, to, output, speech=None, ema=False, force=False):
    """Export the student of a checkpoint.

    Args:
        checkpoint: path of a fairseq checkpoint.
        to: a name in FORMATS.
        output: path of the folder or file to make.
        speech: audio file or manifest to verify with (default: the validation data of the training).
        ema: take the moving average of the weights.
        force: replace an export that is there already.

    Returns:
        the comparison, as stored with the export.

    Raises:
        InputError: something cannot be used, or the format cannot hold this student.
        ExportMismatch: the export computes something else than the training model.
    """
    check_choice("--to", to, FORMATS)
    check_output(output, force)
    state = load_checkpoint(checkpoint)
    if ema:
        state = with_moving_average(state, checkpoint)
    student = student_from_checkpoint(state, checkpoint)
    if before_full_depth(student):
        logger.warning(
            f"{checkpoint}: {before_full_depth(student)}; export a later checkpoint of the run, or let it train on"
        )
    subsets = (state["cfg"].get("dataset") or {}).get("valid_subset", "valid")
    speech = speech or Path(state["cfg"]["task"].get("data") or "") / f"{subsets.split(',')[0]}.tsv"
    if not speech.is_file():
        raise InputError(f"{speech} does not exist; give --speech an audio file or a manifest to verify with")
    waveforms = read_speech(speech, student.conv_layers)
    format = FORMATS[to]
    normalization = format.normalization(student)
    if normalization:
        alike = replace(student, normalize_epsilon=format.normalizer[1])
        normalization = normalization, training_model(state, alike, checkpoint)[1]

    def card(proof):
        with input_errors(f"{checkpoint} has a configuration that describes no training"):
            return model_card(student, state, proof, ema)

    name, reference = training_model(state, student, checkpoint)
    return write_verified(
        partial(format.write, student),
        partial(format.load, student=student),
        reference,
        waveforms,
        student.conv_layers,
        output,
        force,
        format.padding(student),
        normalization,
        {"format": to, "compared_with": name},
        card,
    )


def training_model(state, student, checkpoint):
    """What to compare an export with: the training model, or without fairseq the same weights in plain PyTorch.

    Returns:
        its name, and a function from a list of [S] to {name: [B, T, D]}.
    """
    try:
        from fairseq_stack.models.stacked_hubert import StackedHubert
    except ImportError:
        name, model = "the same weights in plain PyTorch (fairseq is not installed)", PlainStudent(student)
        return name, lambda waveforms: model.outputs(*padded_batch(waveforms))
    model = StackedHubert.from_checkpoint(state, checkpoint)

    def outputs(waveforms):
        output = model(*padded_batch(waveforms, student.normalize_epsilon if student.normalize else None))
        heads = {f"head {layer}": prediction for layer, prediction in output["predictions"].items()}
        return {**dict(enumerate(output["hidden_states"])), **heads}

    return "the training model", outputs
