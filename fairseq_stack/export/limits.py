"""Limits of the formats: the students that each of them cannot hold, and why."""

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS
from fairseq_stack.export.plain import heads_on_top
from fairseq_stack.models.conv_geometry import samples_per_frame

SAMPLES_PER_FRAME = 320  # samples per frame, fixed in s3prl's upstreams


def check_format_holds(student: Student, format: str) -> None:
    """Raise InputError if `format`, a name in FORMATS, cannot hold a student; the message names formats that can."""
    reason = _refusal(student, format)
    if reason:
        others = [name for name in FORMATS if not _refusal(student, name)]
        raise InputError(f"{reason}; export it with --to {' or '.join(others)}")


def _refusal(student: Student, format: str) -> str | None:
    return next(filter(None, (limit(student) for limit in FORMATS[format].limits)), None)


def norm_behind_the_cnn(student: Student) -> str | None:
    if not student.config.get("feature_layer_norm", True):
        return "model.feature_layer_norm=false: HuBERT in fairseq and s3prl has a layer norm behind the CNN"


def frames_of_20_ms(student: Student) -> str | None:
    hop = samples_per_frame(student.conv_layers)
    if hop != SAMPLES_PER_FRAME:
        return (
            f"model.conv_feature_layers={student.config['conv_feature_layers']} makes a frame of {hop} samples, and"
            f" s3prl assumes {SAMPLES_PER_FRAME} ({1000 * SAMPLES_PER_FRAME // SAMPLE_RATE} ms)"
        )


def no_norm_behind_the_cnn(student: Student) -> str | None:
    if student.config.get("feature_layer_norm", True):
        return "model.feature_layer_norm=true: s3prl's distiller has no norm behind the CNN"


def no_biases_in_the_cnn(student: Student) -> str | None:
    if student.config["conv_bias"]:
        return "model.conv_bias=true: the CNN of s3prl's distiller has no biases"


def post_norm(student: Student) -> str | None:
    if student.config["layer_norm_first"]:
        return "model.layer_norm_first=true: s3prl's distiller hands out the last layer without its final norm"


def waveforms_as_recorded(student: Student) -> str | None:
    if student.normalize:
        return "task.normalize=true: s3prl's distiller takes the waveform as it is"


def has_heads(student: Student) -> str | None:
    if not student.heads:
        loss = student.config["loss"]
        return f"criterion.loss={loss}: s3prl's distiller needs prediction heads, and there are none"
    if getattr(LOSSES.get(student.config["loss"]), "codes", ""):
        return (
            f"criterion.loss={student.config['loss']}: the heads of s3prl's distiller predict hidden states, not codes"
        )


def heads_on_the_last_layer(student: Student) -> str | None:
    if {int(name.split(".")[1]) for name in student.heads} != set(heads_on_top(student)):
        return (
            f"criterion.intermediate_style={student.config['intermediate_style']}: the heads of s3prl's distiller are"
            " all on the last layer"
        )
