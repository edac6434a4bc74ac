"""Apply a growth to a model's layers and to the optimiser that trains them.

A layer is more than its weights: fairseq's fp16 and bf16 optimisers keep fp32 master copies, which
overwrite the weights at the next step, and Adam keeps two moments for every weight. A growth copies
all of them, or the woken layer would not be the copy that it is meant to be.
"""

import torch


def paired_parameters(layers, growth):
    """Pairs (source, woken) of parameters for the pairs (source seat, woken seat) of a growth, in its order."""
    for source_seat, woken_seat in growth:
        source, woken = layers[source_seat], layers[woken_seat]
        yield from zip(source.parameters(), woken.parameters())


@torch.no_grad()
def copy_weights(pairs):
    """Copy each source parameter into the woken one, in place."""
    for source, woken in pairs:
        woken.copy_(source)


@torch.no_grad()
def copy_optimizer_state(optimizer, pairs, moments):
    """Carry fp32 master copies and moments over from source to woken parameters, in place.

    Args:
        optimizer: a fairseq optimiser: plain, fp16, bf16 (masters flat or one per parameter),
            memory-efficient or AMP.
        pairs: pairs (source, woken) of the model's parameters.
        moments: `copy`, or `reset` for zeros. Adam's step count goes on in both, as it must where
            one flat buffer holds all parameters.
    """
    slots = _master_slots(optimizer)
    state = optimizer.optimizer.state
    for source, woken in pairs:
        source_owner, source_part = slots.get(source, (source, ...))
        woken_owner, woken_part = slots.get(woken, (woken, ...))
        if woken_owner is not woken:
            woken_owner.data[woken_part].copy_(source_owner.data[source_part])
        if woken_owner is not source_owner and source_owner in state:
            state[woken_owner] = {
                name: value.clone() if torch.is_tensor(value) else value for name, value in state[source_owner].items()
            }
        for value in state[woken_owner].values() if woken_owner in state else ():
            if not torch.is_tensor(value) or value.shape != woken_owner.shape:
                continue
            if moments == "reset":
                value[woken_part].zero_()
            elif woken_owner is source_owner:
                value[woken_part].copy_(value[source_part])


def _master_slots(optimizer):
    """Where the fp32 master of each half-precision parameter lies: {parameter: (owner, index)}.

    FP16Optimizer keeps either one flat buffer for each device, with the parameters in order, or one
    master for each parameter. Optimisers without masters give an empty mapping.
    """
    masters = getattr(optimizer, "fp32_params", None)
    if masters is None:
        return {}
    if not optimizer.has_flat_params:
        return {half: (master, ...) for half, master in zip(optimizer.fp16_params, masters)}
    # One buffer for each device; all of a data-parallel rank's parameters lie on one.
    (flat,) = masters.values()
    slots, offset = {}, 0
    for half in optimizer.fp16_params:
        slots[half] = (flat, slice(offset, offset + half.numel()))
        offset += half.numel()
    return slots
