"""The export formats by name. The module of each format registers it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_stack.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from fairseq_stack.checkpoints.student import Student

# A function from a list of waveforms [S] to hidden states {number: [B, T, D]} and, if the format has prediction heads,
# {"head {teacher layer}": [B, T, teacher width]}.
Outputs = Callable[[list["Tensor"]], dict[int | str, "Tensor"]]

PRECISIONS = ("fp32", "fp16", "int8")
HIDDEN_STATES = ("all", "last", "weighted")

ONE_BY_ONE = "give it one utterance at a time, or use --to onnx"


@dataclass(frozen=True)
class Format:
    """How to write and load an export, and where its library computes something else than the training did.

    Attributes:
        load: load(path, student=student) returns the export's Outputs.
        write: write(student, path) writes the export.
        help: what the export is and what loads it.
        group_norm: how a padded batch changes the features of a student with a group norm, and what to use instead;
            None if it does not.
        layer_norm: the same for a student without a group norm.
        normalizer: the library that normalises waveforms, and what it adds to their variance; None if the export
            normalises as the training did.
        limits: functions of a student; each returns why the format cannot hold it, or None if it can.
        fine_tuned: whether the format can hold a fine-tuned student, with its output layers.
        choices: the options that `write` and `load` take besides, and their values. The first is the default.
    """

    load: Callable[..., Outputs]
    write: Callable[["Student", Path], None]
    help: str
    group_norm: str | None = None
    layer_norm: str | None = None
    normalizer: tuple[str, float] | None = None
    limits: tuple[Callable[["Student"], str | None], ...] = ()
    fine_tuned: bool = False
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def padding(self, student: "Student") -> str | None:
        """Why a padded batch of this student gives other features, and what to use instead; None if it does not."""
        return self.group_norm if student.config["extractor_mode"] == "default" else self.layer_norm

    def normalization(self, student: "Student") -> str | None:
        """Why waveforms are not normalised as in training, or None if they are."""
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
