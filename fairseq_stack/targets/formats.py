"""How targets are stored: in half precision, or in eight bits with a scale for each frame."""

import torch
from torch import Tensor

# Bytes of one value, and of a frame's scale.
BYTES = {"fp16": (2, 0), "int8": (1, 2)}
PARTS = {"fp16": ("values",), "int8": ("values", "scale")}
FORMATS = tuple(PARTS)
SMALLEST_SCALE = 2.0**-24  # of fp16


def encode(values: Tensor, form: str) -> dict[str, Tensor]:
    """Return values [..., D] rounded to a format.

    Args:
        values: a tensor of any floating type.
        form: `fp16`, or `int8`: the largest value of a frame becomes 127, and the others are rounded to
            multiples of the frame's scale.

    Returns:
        {part: tensor}: `values` [..., D] and, with int8, `scale` [..., 1]. fairseq does not change their types
        when it converts a batch to half precision.
    """
    if form == "fp16":
        return {"values": values.half()}
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE).half()
    # The scale is rounded too, and may become too small for the largest value: hence the clamp.
    return {"values": (wide / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def decode(parts: dict[str, Tensor]) -> Tensor:
    """Return the values [..., D] that `encode` rounded, in fp32."""
    values = parts["values"].float()
    return values * parts["scale"].float() if "scale" in parts else values
