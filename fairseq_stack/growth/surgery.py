"""Apply a growth to a model's layers and to the optimizer that trains them.

A layer is more than its weights. fairseq's fp16 and bf16 optimizers keep fp32 masters of the weights, and
the next step overwrites the weights with them. Adam keeps two moments for every weight. A growth has to
copy all of these, otherwise the new layer would not be a copy of its source.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ParameterPair(NamedTuple):
    """A parameter of the model and its copy. A silent copy starts at zero, and so do its moments."""

    source: Tensor
    new: Tensor
    silent: bool = False


def paired_parameters(
    layers: Sequence[nn.Module] | nn.ModuleList, growth: Iterable[tuple[int, int]], silent: Iterable[str] = ()
) -> Iterator[ParameterPair]:
    """The pairs of parameters, in order, for the pairs (source seat, new seat) of a growth.

    Args:
        layers: of the model; seats are their indices.
        growth: the pairs of seats.
        silent: names in a layer of the modules whose copies are silent, such as `fc2`.
    """
    for source_seat, new_seat in growth:
        copies = dict(layers[new_seat].named_parameters())
        for name, source in layers[source_seat].named_parameters():
            yield ParameterPair(source, copies[name], name.rpartition(".")[0] in silent)


@torch.no_grad()
def copy_weights(pairs: Iterable[ParameterPair]) -> None:
    """Copy each source parameter to the new one, in place."""
    for source, new, silent in pairs:
        new.copy_(source)
        if silent:
            new.zero_()


@torch.no_grad()
def copy_optimizer_state(optimizer: Any, pairs: Iterable[ParameterPair], moments: str) -> None:
    """Copy fp32 masters and moments from source parameters to new ones, in place.

    Args:
        optimizer: a fairseq optimizer: plain, fp16, bf16 (masters flat or one per parameter),
            memory-efficient or AMP.
        pairs: the pairs of the model's parameters.
        moments: `copy`, or `reset` for zeros. A new parameter takes over Adam's step count either way: if one flat
            buffer holds all parameters, they share it.
    """
    slots = _master_slots(optimizer)
    state = optimizer.optimizer.state
    for source, new, silent in pairs:
        source_owner, source_part = slots.get(source, (source, ...))
        new_owner, new_part = slots.get(new, (new, ...))
        if new_owner is not new:
            new_owner.data[new_part].copy_(source_owner.data[source_part])
            if silent:
                new_owner.data[new_part].zero_()
        if new_owner is not source_owner and source_owner in state:
            state[new_owner] = {
                name: value.clone() if torch.is_tensor(value) else value for name, value in state[source_owner].items()
            }
        for value in state[new_owner].values() if new_owner in state else ():
            if not torch.is_tensor(value) or value.shape != new_owner.shape:
                continue
            if silent or moments == "reset":
                value[new_part].zero_()
            elif new_owner is source_owner:
                value[new_part].copy_(value[source_part])


def _master_slots(optimizer: Any) -> dict[Tensor, tuple[Tensor, Any]]:
    """Return where the fp32 master of each half-precision parameter is: {parameter: (owner, index)}.

    FP16Optimizer keeps either one flat buffer for each device, with the parameters in order, or one
    master for each parameter. The mapping is empty for optimizers without masters.
    """
    masters = getattr(optimizer, "fp32_params", None)
    if masters is None:
        return {}
    if not optimizer.has_flat_params:
        return {half: (master, ...) for half, master in zip(optimizer.fp16_params, masters)}
    # One buffer for each device; all parameters of a data-parallel rank are on one device.
    (flat,) = masters.values()
    slots, offset = {}, 0
    for half in optimizer.fp16_params:
        slots[half] = (flat, slice(offset, offset + half.numel()))
        offset += half.numel()
    return slots
