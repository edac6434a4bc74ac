"""Frames from samples: the formula that all modules use for frame counts.

A convolution without padding turns n inputs into floor((n - kernel) / stride) + 1 outputs. The
extractors of HuBERT, wav2vec 2.0 and WavLM are stacks of such convolutions.
"""

import ast
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

# (channels, kernel, stride) of each layer of a CNN.
ConvLayers = list[tuple[int, int, int]]
Count = TypeVar("Count", int, "Tensor")


def parse_conv_layers(text: str) -> ConvLayers:
    """Parse fairseq's `conv_feature_layers` string to [(channels, kernel, stride), ...].

    fairseq writes a Python expression of integer tuples, lists, `+` and `*`, such as
    "[(512,10,5)] + [(512,3,2)] * 4", and evaluates it. This function parses only that grammar, so a
    configuration file cannot run code.

    Raises:
        ValueError: the text is anything else.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(value(item) for item in node.elts)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 100_000:
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = value(node.left), value(node.right)
            # The limit is on the product and not on the factor, because a chain of factors could fill the memory.
            if isinstance(left, list) and isinstance(right, int) and len(left) * right <= 100:
                return left * right
        raise ValueError(text)

    try:
        layers = value(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(text) from error
    if (
        not isinstance(layers, list)
        or not layers
        or not all(isinstance(layer, tuple) and len(layer) == 3 for layer in layers)
        or not all(isinstance(number, int) and number > 0 for layer in layers for number in layer)
    ):
        raise ValueError(text)
    return layers


def frames_from_samples(samples: Count, conv_layers: Iterable[tuple[int, int, int]]) -> Count:
    """The number of frames that a stack of unpadded convolutions computes from `samples` samples.

    Args:
        samples: an int, or an integer tensor of any shape.
        conv_layers: [(channels, kernel, stride), ...].

    Returns:
        the same type as `samples`; zero or less if the audio is shorter than one frame.
    """
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def samples_per_frame(conv_layers: Iterable[tuple[int, int, int]]) -> int:
    """The hop between two frames in samples, which is the product of the strides."""
    hop = 1
    for _, _, stride in conv_layers:
        hop *= stride
    return hop


def receptive_field(conv_layers: Sequence[tuple[int, int, int]]) -> int:
    """The number of samples from which one frame is computed, and so the shortest usable audio."""
    samples = 1
    for _, kernel, stride in reversed(conv_layers):
        samples = (samples - 1) * stride + kernel
    return samples
