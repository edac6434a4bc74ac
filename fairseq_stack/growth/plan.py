"""Which layers are copied where at each growth, as data.

Every layer of the full student has a seat, 0 to N - 1, from the first update to the last. A stage
uses some of the seats, in ascending order; a growth wakes idle seats, each with a copy of a layer
that is already in use. The seats follow from simulating the whole growth once, so that the layer
in `encoder.layers.7` never has to move.
"""

from dataclasses import dataclass
from typing import Tuple

from fairseq_stack.errors import InputError


@dataclass(frozen=True)
class GrowthPlan:
    """The seats of every stage, and the copies between two stages.

    Attributes:
        stages: for each stage the seats in use, in the order of the forward pass.
        growths: for each growth the pairs (source seat, woken seat); one fewer than the stages.
    """

    stages: Tuple[Tuple[int, ...], ...]
    growths: Tuple[Tuple[Tuple[int, int], ...], ...]

    @property
    def depths(self):
        """Layers in use at each stage."""
        return tuple(len(seats) for seats in self.stages)


def _interleaved(layers, block, stage):
    """After stage b, a copy of every b-th layer goes right behind its original.

    Kim & Lee, "Fast Speech Foundation Model Distillation Using Interleaved Stacking",
    Interspeech 2026.
    """
    return [(index, index) for index in range(stage - 1, len(layers), stage)]


_INSERTIONS = {"interleaved": _interleaved}
METHODS = ("none", *_INSERTIONS)


def plan_growth(method, layers, stages):
    """Plan the growth of a student to `layers` layers in `stages` stages.

    Args:
        method: one of METHODS; `none` has all layers from the start.
        layers: N, the layers of the finished student.
        stages: B, the stages; stage b has b * N / B layers.

    Raises:
        InputError: the method is unknown, or it cannot divide the layers into these stages.
    """
    if method not in METHODS:
        raise InputError(f"model.stack_method={method} is unknown; choose from {', '.join(METHODS)}")
    if layers < 1 or stages < 1:
        raise InputError(f"model.encoder_layers={layers} and model.stack_stages={stages} must be at least 1")
    if method == "none":
        if stages != 1:
            raise InputError(f"model.stack_stages={stages} has no meaning with model.stack_method=none; set it to 1")
        return GrowthPlan(stages=(tuple(range(layers)),), growths=())
    if layers % stages:
        raise InputError(
            f"model.encoder_layers={layers} is not divisible by model.stack_stages={stages};"
            f" choose a number of stages that divides the layers"
        )

    block = layers // stages
    # A layer is known by its order of birth while the stack is being simulated.
    order = list(range(block))
    orders, births = [tuple(order)], []
    for stage in range(1, stages):
        copies = []
        # Back to front, so that an insertion does not shift the ones still to be made.
        for source, behind in reversed(_INSERTIONS[method](order, block, stage)):
            copies.append((order[source], behind))
        grown, pairs = list(order), []
        for source, behind in copies:
            born = len(order) + len(pairs)
            grown.insert(behind + 1, born)
            pairs.append((source, born))
        order = grown
        orders.append(tuple(order))
        births.append(pairs)
    seat = {layer: index for index, layer in enumerate(order)}
    return GrowthPlan(
        stages=tuple(tuple(seat[layer] for layer in stack) for stack in orders),
        growths=tuple(tuple(sorted((seat[source], seat[born]) for source, born in pairs)) for pairs in births),
    )
