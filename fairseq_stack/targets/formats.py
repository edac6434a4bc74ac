"""How targets are kept: half precision, or eight bits with a scale for each frame."""

import torch

# Bytes of one value, and of what is kept beside the values of a frame.
BYTES = {"fp16": (2, 0), "int8": (1, 2)}
PARTS = {"fp16": ("values",), "int8": ("values", "scale")}
FORMATS = tuple(PARTS)
SMALLEST_SCALE = 2.0**-24  # of fp16


def encode(values, form):
    """Round [..., D] to a format.

    Args:
        values: a tensor of any floating type.
        form: `fp16`, or `int8`: the largest value of a frame becomes 127, and the others are rounded to
            multiples of its scale.

    Returns:
        {part: tensor}: `values` [..., D] and, with int8, `scale` [..., 1]. Both are of types that
        fairseq leaves alone when it halves a batch.
    """
    if form == "fp16":
        return {"values": values.half()}
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE).half()
    # The scale is rounded too, and may then be too small for the largest value.
    return {"values": (wide / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def decode(parts):
    """What `encode` has kept, as [..., D] in fp32."""
    values = parts["values"].float()
    return values * parts["scale"].float() if "scale" in parts else values
