"""A student as an ONNX file, which computes padded batches as exactly as training does."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS, Outputs
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import padded_batch
from fairseq_stack.models.conv_geometry import receptive_field

_OPSET = 17  # the first opset with a layer norm


def export_onnx(student: Student, file: str | Path) -> None:
    """Write the student as an ONNX file, for onnxruntime and similar libraries.

    Inputs: `waveforms` [B, S], float32 samples at 16 kHz as recorded, with zeros after the end of an utterance, and
    `lengths` [B], int64, the samples of each utterance. Outputs: `hidden_state_0` to `hidden_state_{depth}`,
    [B, T, D], and `frames` [B], the frames of each utterance. Values beyond an utterance's frames are undefined. B
    and S are free.

    Args:
        student: a Student.
        file: where to write.

    Raises:
        InputError: onnx is not installed.
    """
    _import("onnx")
    samples = 2 * receptive_field(student.conv_layers)
    names = [f"hidden_state_{number}" for number in range(student.depth + 1)]
    axes = {name: {0: "utterances", 1: "frames"} for name in names}
    axes.update(waveforms={0: "utterances", 1: "samples"}, lengths={0: "utterances"}, frames={0: "utterances"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PlainStudent(student).eval()
        model.attend = torch.jit.script(model.attend)
        # dynamo=False is torch's tracing exporter. It needs no onnxscript and, unlike its successor, writes no paths of
        # this machine into the file. Tracing is safe because the forward pass has no branches that depend on the data.
        torch.onnx.export(
            model,
            (torch.zeros(2, samples), torch.tensor([samples, samples // 2])),
            str(file),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["waveforms", "lengths"],
            output_names=[*names, "frames"],
            dynamic_axes=axes,
        )


@FORMATS.register("onnx", write=export_onnx, help="a file for onnxruntime, for batches of any size and length")
def load_onnx(file: str | Path, student: Student) -> Outputs:
    """Load an export with onnxruntime; returns its hidden states as a function of waveforms.

    Args:
        file: what export_onnx wrote.
        student: the Student.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}.

    Raises:
        InputError: onnxruntime is not installed.
    """
    session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def outputs(waveforms: list[torch.Tensor]) -> dict[int | str, torch.Tensor]:
        inputs, lengths = padded_batch(waveforms)  # the graph normalises
        *states, _ = session.run(None, {"waveforms": inputs.numpy(), "lengths": lengths.numpy()})
        return {number: torch.from_numpy(state) for number, state in enumerate(states)}

    return outputs


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--to onnx: {name} cannot be imported ({error}); pip install onnx onnxruntime") from None
