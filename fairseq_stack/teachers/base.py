"""The interface of a teacher, and what its implementations share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fairseq_stack.errors import InputError

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def default_precision(cpu: bool = False) -> str:
    """Return the teacher's precision if none is chosen: half precision on a GPU, unless the training uses the CPU."""
    if cpu or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"  # since Ampere


class Teacher(ABC):
    """A frozen speech foundation model in eval mode that gives hidden states without gradient.

    It takes recorded waveforms and normalises them itself if its training did. The hidden states of an utterance do
    not depend on the rest of the batch.

    Attributes:
        name: the file or folder that it was loaded from, for messages.
        family: the model's usual name, such as HuBERT.
        depth: number of transformer layers.
        width: features of a hidden state.
        conv_layers: [(channels, kernel, stride)], the convolutions that determine the number of frames.
        longest: the most samples that it can take; None without a limit.
        normalize: whether its training normalised the waveforms; None if it computes a spectrogram.
        epsilon: the number that this normalisation adds to the variance of a waveform.
        model: the network. A student can start from it if it is a HubertEncoder.
    """

    name: str
    family: str
    depth: int
    width: int
    conv_layers: list[tuple[int, int, int]]
    longest: int | None = None
    normalize: bool | None = None
    epsilon: float | None = None
    model: torch.nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which it computes."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def hidden_states(self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the outputs of chosen layers. The last layer's output includes a pre-norm encoder's final layer norm.

        Args:
            waveforms: [B, S], samples at 16 kHz, zeros after the end of an utterance.
            lengths: [B], samples, on the CPU. (On a GPU, the CPU would wait for them.)
            layers: numbers from 0 to depth; 0 is the input of the first layer.

        Returns:
            {layer: [B, T, width]}, on the waveforms' device. T is the number of frames of the longest
            utterance. Values after the last frame of an utterance have no meaning.
        """

    @abstractmethod
    def frames(self, samples: int) -> int:
        """Return the number of frames that the teacher makes of `samples` samples.

        Raises:
            InputError: the teacher cannot take that many.
        """


class CnnTeacher(Teacher):
    """A Teacher whose CNN a student can share."""

    @abstractmethod
    def cnn_features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Return the CNN's features [B, C, T] of waveforms [B, S] of `lengths` [B] samples."""

    @abstractmethod
    def hidden_states(
        self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int], features: Tensor | None = None
    ) -> dict[int, Tensor]:
        """See Teacher. `features` are those of `cnn_features`, if they are computed already."""


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Make a GPU compute fp32 with full precision, inside a `with` block or a decorated function.

    By default, torch computes convolutions in TF32, with 10 of the mantissa's 23 bits, and matrix products in fp32.
    A teacher in bf16 or fp16 (task.teacher_precision) is faster.
    """
    switches = fp32_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, exact in switches:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before):
            setattr(owner, name, value)


def fp32_switches() -> tuple[tuple, tuple]:
    """Return torch's settings for fp32 on a GPU, for convolutions and for matrix products.

    torch 2.9 has new settings. It refuses to read the old ones after a program has set the new ones.

    Returns:
        two tuples (owner, name of its attribute, value for full precision).
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(convolutions, "conv"):
        return (convolutions.conv, "fp32_precision", "ieee"), (products, "fp32_precision", "ieee")
    return (convolutions, "allow_tf32", False), (products, "allow_tf32", False)


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict that must fit exactly, convert the model to fp32 and freeze it in eval mode.

    Args:
        model: a torch module.
        weights: its state dict, in any precision.
        name: the teacher's name in errors.

    Raises:
        InputError: a weight is missing, left over, no tensor or of another shape.
    """
    expected = model.state_dict()
    for key in [*expected, *weights]:
        if key not in weights:
            raise InputError(f"task.teacher={name} lacks the weight {key} that its configuration asks for")
        if key not in expected:
            raise InputError(f"task.teacher={name} has the weight {key} that its configuration has no place for")
        if not torch.is_tensor(weights[key]):
            raise InputError(f"task.teacher={name} has {weights[key]!r} for the weight {key}; it is damaged")
        if weights[key].shape != expected[key].shape:
            raise InputError(
                f"task.teacher={name}: {key} has the shape {tuple(weights[key].shape)}, but its configuration"
                f" asks for {tuple(expected[key].shape)}"
            )
    # `assign`, because the model may still be on the meta device, without memory.
    torch.nn.Module.load_state_dict(model, weights, assign=True)
    model.float().eval().requires_grad_(False)
