"""What the rest of the package knows of a teacher."""

from abc import ABC, abstractmethod
from contextlib import contextmanager

import torch

from fairseq_stack.errors import InputError

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Teacher(ABC):
    """A frozen speech foundation model in eval mode that gives hidden states without gradient.

    It takes waveforms as they are recorded and normalises them itself where its training did. What it
    gives for an utterance does not depend on the batch.

    Attributes:
        name: what to call it in messages: the file or folder it was loaded from.
        family: what people call the model, such as HuBERT.
        depth: number of transformer layers.
        width: features of a hidden state.
        conv_layers: [(channels, kernel, stride)], the convolutions by which frames are counted.
        longest: the most samples that it can take; None where there is no limit.
        normalize: whether its training normalised the waveforms; None where it computes a spectrogram.
        epsilon: what that added to the variance of a waveform.
        model: the network; a student can start from it where it is a HubertEncoder.
    """

    name: str
    family: str
    depth: int
    width: int
    conv_layers: list
    longest: int = None
    normalize: bool = None
    epsilon: float = None
    model: torch.nn.Module

    @property
    def dtype(self):
        """The precision it computes in."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def hidden_states(self, waveforms, lengths, layers):
        """Outputs of chosen layers; the last one of a pre-norm encoder has passed its final layer norm.

        Args:
            waveforms: [B, S], samples at 16 kHz, zeros behind the end of an utterance.
            lengths: [B], samples.
            layers: numbers from 0 to depth; 0 is the input of the first layer.

        Returns:
            {layer: [B, T, width]}, on the waveforms' device. T is the frames of the longest
            utterance; what lies behind the frames of an utterance has no meaning.
        """

    @abstractmethod
    def frames(self, samples):
        """Frames that the teacher makes of `samples` samples (an int).

        Raises:
            InputError: the teacher cannot take that many.
        """


@contextmanager
def exact_fp32():
    """Compute fp32 on a GPU in fp32, inside a `with` block or a decorated function.

    torch's own choice is TF32 for convolutions, which keeps 10 bits of the mantissa's 23, and fp32 for matrix products.
    A teacher that is to be faster than fp32 has task.teacher_precision=bf16 or fp16.
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


def fp32_switches():
    """Where torch is told how a GPU computes fp32: (owner, name, the value for fp32) of convolutions and of products.

    torch 2.9 has new switches, and refuses to read the old ones where somebody has set the new.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(convolutions, "conv"):
        return (convolutions.conv, "fp32_precision", "ieee"), (products, "fp32_precision", "ieee")
    return (convolutions, "allow_tf32", False), (products, "allow_tf32", False)


def load_weights(model, weights, name):
    """Load a state dict that must fit exactly, in fp32, and freeze the model in eval mode.

    Args:
        model: a torch module.
        weights: its state dict; the precision may differ.
        name: what an error calls the teacher.

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
    torch.nn.Module.load_state_dict(model, weights, assign=True)  # a model may have no memory for them yet
    model.float().eval().requires_grad_(False)
