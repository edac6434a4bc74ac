"""How targets are stored: rounded to half precision or to eight bits, or as codes of learned codebooks."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq_stack.errors import InputError

if TYPE_CHECKING:
    from fairseq_stack.targets.codebooks import Codebooks

ROUNDED = ("fp16", "int8")
CODES = {"pq": "one byte of a frame for each of N codebooks", "units": "one of N clusters for a frame"}
BYTE = 256  # values of a byte
MOST_UNITS = 2**15  # values of a code in two bytes
SMALLEST_SCALE = 2.0**-24  # of fp16


def check_format(form: str) -> None:
    """Raise an InputError unless task.target_format is the name of a format."""
    shape = codebook_shape(form)
    if form not in ROUNDED and shape is None:
        codes = [f"{kind}N ({what})" for kind, what in CODES.items()]
        raise InputError(f"task.target_format={form} is unknown; choose from {', '.join([*ROUNDED, *codes])}")
    if shape and not 2 <= shape[1] <= MOST_UNITS:
        raise InputError(f"task.target_format={form} must have 2 to {MOST_UNITS} units")


def kind_of(form: str) -> str:
    """Return a format without its number: fp16, int8, pq or units."""
    return form if form in ROUNDED else form.rstrip("0123456789")


def codebook_shape(form: str) -> tuple[int, int] | None:
    """Return the number of codebooks of a format and of the entries of each; None for a format without codebooks."""
    match = re.fullmatch(rf"({'|'.join(CODES)})([1-9]\d*)", form)
    if match is None:
        return None
    number = int(match[2])
    return (number, BYTE) if match[1] == "pq" else (1, number)


def frame_bytes(form: str, width: int) -> int:
    """Return the bytes of one frame of `width` features."""
    shape = codebook_shape(form)
    if shape is None:
        return 2 * width if form == "fp16" else width + 2
    return shape[0] * (1 if shape[1] <= BYTE else 2)


def parts_of(form: str, width: int) -> dict[str, int]:
    """Return {part of an encoded frame: its size} for a frame of `width` features."""
    shape = codebook_shape(form)
    if shape is not None:
        return {"codes": shape[0]}
    return {"values": width, "scale": 1} if form == "int8" else {"values": width}


def encode(values: Tensor, form: str, codebooks: "Codebooks | None" = None) -> dict[str, Tensor]:
    """Return values [..., D] in a format.

    Args:
        values: a tensor of any floating type.
        form: `fp16`; `int8`: the largest value of a frame becomes 127, and the others are rounded to
            multiples of the frame's scale; or a format of codes.
        codebooks: for a format of codes.

    Returns:
        {part: tensor}: `values` [..., D] and, with int8, `scale` [..., 1]; or `codes` [..., codebooks]. fairseq does
        not change their types when it converts a batch to half precision.
    """
    if codebooks is not None:
        return {"codes": codebooks.encode(values)}
    if form == "fp16":
        return {"values": values.half()}
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE).half()
    # The scale is rounded too, and may become too small for the largest value: hence the clamp.
    return {"values": (wide / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def decode(
    parts: dict[str, Tensor], codebooks: "Codebooks | None" = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values [..., D] that `encode` rounded, in fp32. `dtype` is that of Codebooks.decode."""
    if codebooks is not None:
        return codebooks.decode(parts["codes"], dtype)
    values = parts["values"].float()
    return values * parts["scale"].float() if "scale" in parts else values
