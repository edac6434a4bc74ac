"""Frames from samples: the one formula for every module that needs a frame count.

A convolution without padding turns n inputs into floor((n - kernel) / stride) + 1 outputs; the
extractors of HuBERT, wav2vec 2.0 and WavLM are stacks of such convolutions.
"""

import ast


def parse_conv_layers(text):
    """Return [(channels, kernel, stride), ...] from fairseq's `conv_feature_layers` string.

    fairseq writes a Python expression of integer tuples, lists, `+` and `*`, such as
    "[(512,10,5)] + [(512,3,2)] * 4", and evaluates it. Here only that grammar is read, so that a
    configuration file cannot run code.

    Raises:
        ValueError: the text is anything else.
    """

    def value(node):
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
            # The product is bounded, not the factor: a chain of factors would fill the memory.
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


def frames_from_samples(samples, conv_layers):
    """Frames that a stack of unpadded convolutions makes of `samples` samples.

    Args:
        samples: an int, or an integer tensor of any shape.
        conv_layers: [(channels, kernel, stride), ...].

    Returns:
        the same type as `samples`; zero or less where the audio is shorter than one frame.
    """
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def samples_per_frame(conv_layers):
    """The hop between two frames, in samples: the product of the strides."""
    hop = 1
    for _, _, stride in conv_layers:
        hop *= stride
    return hop


def receptive_field(conv_layers):
    """Samples that one frame sees, which is also the shortest audio that makes a frame."""
    samples = 1
    for _, kernel, stride in reversed(conv_layers):
        samples = (samples - 1) * stride + kernel
    return samples
