"""The formats of an export by name. Each registers where it is written."""

from collections.abc import Callable
from dataclasses import dataclass

from fairseq_stack.registry import Registry

ONE_BY_ONE = "give it one utterance at a time, or use --to onnx"


@dataclass(frozen=True)
class Format:
    """How to write and load an export, and why it cannot agree in a padded batch.

    Attributes:
        load: (path, student) to a function from a list of [S] to {name: [B, T, D]}.
        write: (student, path) to nothing.
        help: what it is for.
        group_norm: what a padded batch does to students with a group norm, and what to use; None for nothing.
        layer_norm: the same for students without one.
        normalizer: the library that normalises waveforms, and what it adds to their variance; None where the export
            does it as the training did.
        limits: functions of a student: why the format cannot hold it, or None where it can.
    """

    load: Callable
    write: Callable
    help: str
    group_norm: str | None = None
    layer_norm: str | None = None
    normalizer: tuple[str, float] | None = None
    limits: tuple[Callable, ...] = ()

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


FORMATS = Registry(
    "--to",
    [f"fairseq_stack.export.{module}" for module in ("huggingface", "s3prl", "distiller", "fairseq", "onnx")],
    Format,
)
