"""A student as an ONNX file, which computes padded batches as exactly as training does."""

import importlib
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import FORMATS, HIDDEN_STATES, PRECISIONS, Outputs
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import padded_batch, trial_weights, weighted_sum
from fairseq_stack.models.conv_geometry import receptive_field, samples_per_frame

_OPSET = 17  # the first opset with a layer norm

_LANES = 16  # a product is quantised only if its outputs are a multiple of this
_SMALL = 4096  # values of a tensor that is not worth storing in fp16


def export_onnx(student: Student, file: str | Path, precision: str = "fp32", hidden_states: str = "all") -> None:
    """Write the student as an ONNX file, for onnxruntime and similar libraries.

    Inputs: `waveforms` [B, S], float32 samples at 16 kHz as recorded, with zeros after the end of an utterance, and
    `lengths` [B], int64, the samples of each utterance. Outputs, all float32: `hidden_state_0` to
    `hidden_state_{depth}`, [B, T, D], and `frames` [B], int64, the frames of each utterance. Values beyond an
    utterance's frames are undefined. B and S are free.

    The file's metadata has "precision", "hidden_states", "parameters", "width" and "samples_per_frame".

    A fine-tuned student has one output instead of the hidden states: `logits`, [B, T, outputs], or [B, outputs] for
    classes of utterances. What the outputs stand for is in the metadata as "labels", a list in JSON.

    Args:
        student: a Student.
        file: where to write.
        precision: "fp32"; "fp16", which stores all weights in fp16 and computes in fp16, except for the first
            convolution and attention's softmax with its two products; or "int8", which quantises the weights of the
            matrix products with onnxruntime's quantiser, each channel by itself, and stores the kernels of the
            convolutions in fp16. Convolutions then compute in fp32.
        hidden_states: "all"; "last", only `hidden_state_{depth}`; or "weighted", only `weighted_sum`, whose weights
            [depth + 1] are another input, `layer_weights`, float32.

    Raises:
        InputError: onnx is not installed, or onnxruntime, which quantises; or int8 would quantise nothing.
    """
    onnx = _import("onnx")
    graph = _Graph(student, hidden_states)
    samples = 2 * receptive_field(student.conv_layers)
    inputs = {"waveforms": torch.zeros(2, samples), "lengths": torch.tensor([samples, samples // 2])}
    if hidden_states == "weighted":
        inputs["layer_weights"] = torch.ones(student.depth + 1)
    axes = {name: {0: "utterances", 1: "frames"} for name in graph.names}
    if student.output and student.output.pooled:
        axes["logits"] = {0: "utterances"}
    axes.update(waveforms={0: "utterances", 1: "samples"}, lengths={0: "utterances"}, frames={0: "utterances"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # dynamo=False is torch's tracing exporter. It needs no onnxscript and, unlike its successor, writes no paths of
        # this machine into the file. Tracing is safe because the forward pass has no branches that depend on the data.
        torch.onnx.export(
            graph.half() if precision == "fp16" else graph,
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=[*graph.names, "frames"],
            dynamic_axes=axes,
        )
    if precision == "int8":
        _quantise(Path(file))
    model = onnx.load(file)
    if precision == "int8":
        _store_kernels_in_fp16(model)
    facts = {
        "precision": precision,
        "hidden_states": hidden_states,
        "parameters": str(sum(tensor.numel() for tensor in student.weights.values())),
        "width": str(student.config["encoder_embed_dim"]),
        "samples_per_frame": str(samples_per_frame(student.conv_layers)),
    }
    if student.output:
        facts["labels"] = json.dumps(student.output.labels, ensure_ascii=False)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, file)


class _Graph(nn.Module):
    """The forward pass with the outputs that the file has.

    Args:
        student: a Student.
        hidden_states: in HIDDEN_STATES.
    """

    def __init__(self, student: Student, hidden_states: str):
        super().__init__()
        self.model = PlainStudent(student).eval()
        self.model.attend = torch.jit.script(self.model.attend)
        self.hidden_states = hidden_states
        numbers = range(student.depth + 1) if hidden_states == "all" else [student.depth]
        self.names = [f"hidden_state_{number}" for number in numbers]
        if hidden_states == "weighted":
            self.names = ["weighted_sum"]
        if student.output:
            self.names = ["logits"]

    def forward(self, waveforms: Tensor, lengths: Tensor, layer_weights: Tensor | None = None) -> tuple:
        """Hidden states in fp32, and the frames; see export_onnx."""
        states, frames = self.model(waveforms, lengths)
        if output := self.model.student.output:
            return self.model.logits(output, states[-1], frames).float(), frames
        states = [state.float() for state in states]
        if layer_weights is not None:
            return weighted_sum(states, layer_weights), frames
        return *(states if self.hidden_states == "all" else states[-1:]), frames


def _quantise(file: Path) -> None:
    """Replace a file by its quantised version: matrix products with constant weights, one scale for each channel."""
    quantization = _import("onnxruntime.quantization")
    graph = _import("onnx").load(file).graph
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    products = {node.name: widths[node.input[1]] for node in graph.node if _has_constant_weights(node, widths)}
    # ONNX Runtime 1.23 computes wrong numbers for other widths, such as those of CTC's letters, on CPUs with AMX.
    odd = [name for name, width in products.items() if width % _LANES]
    if len(odd) == len(products):
        found = ", ".join(map(str, sorted(set(products.values()))))
        raise InputError(
            f"--precision int8: none of the student's widths ({found}) is a multiple of {_LANES}, so nothing would be"
            " quantised; choose fp16 or fp32"
        )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the quantiser warns that it leaves other operations as they are
    try:
        quantization.quantize_dynamic(
            file,
            file,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=odd,
            per_channel=True,
            # Weights of 7 bits: on CPUs with AVX2 or AVX-512 but without VNNI, products of 8 bits overflow.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logging.disable(disabled)


def _has_constant_weights(node: Any, widths: Mapping[str, int]) -> bool:
    return node.op_type == "MatMul" and node.input[1] in widths


def _store_kernels_in_fp16(model: Any) -> None:
    """Store the kernels of a ModelProto's convolutions in fp16; onnxruntime turns them to fp32 when it loads them."""
    onnx = _import("onnx")
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name in kernels and values.size > _SMALL:
            stored = f"{tensor.name}_fp16"
            model.graph.node.insert(
                0, onnx.helper.make_node("Cast", [stored], [tensor.name], to=onnx.TensorProto.FLOAT)
            )
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), stored))


@FORMATS.register(
    "onnx",
    write=export_onnx,
    help="a file for onnxruntime, for batches of any size and length",
    fine_tuned=True,
    choices={"precision": PRECISIONS, "hidden_states": HIDDEN_STATES},
)
def load_onnx(file: str | Path, student: Student, precision: str = "fp32", hidden_states: str = "all") -> Outputs:
    """Load an export with onnxruntime; returns its hidden states as a function of waveforms.

    Args:
        file: what export_onnx wrote.
        student: the Student.
        precision, hidden_states: as given to export_onnx.

    Returns:
        a function from a list of [S] to {0: [B, T, D], ..., depth: [B, T, D]}, or to those of them that the file
        has. Of a file with a weighted sum, {"weighted sum": [B, T, D]} with the weights of `trial_weights`. Of a
        fine-tuned student, {"logits": [B, T, outputs]}, where T is 1 for classes of utterances.

    Raises:
        InputError: onnxruntime is not installed.
    """
    session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def outputs(waveforms: list[Tensor]) -> dict[int | str, Tensor]:
        inputs, lengths = padded_batch(waveforms)  # the graph normalises
        named = {"waveforms": inputs.numpy(), "lengths": lengths.numpy()}
        if hidden_states == "weighted":
            named["layer_weights"] = trial_weights(student.depth).numpy()
        *states, _ = (torch.from_numpy(output) for output in session.run(None, named))
        if student.output:
            return {"logits": states[0][:, None] if student.output.pooled else states[0]}
        if hidden_states == "weighted":
            return {"weighted sum": states[0]}
        return dict(enumerate(states, start=student.depth + 1 - len(states)))

    return outputs


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--to onnx: {name} cannot be imported ({error}); pip install onnx onnxruntime") from None
