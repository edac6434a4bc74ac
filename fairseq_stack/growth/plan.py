"""Which layers are copied where at each growth, as data.

Every layer of the finished student has a fixed seat, 0 to N - 1, from the first update to the last. A
stage uses some of the seats, in ascending order. A growth puts new layers into unused seats; each is a
copy of a layer in use. `plan_growth` simulates the whole growth once to find the seats, so no layer ever
moves: the layer in `encoder.layers.7` stays there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_stack.errors import InputError
from fairseq_stack.registry import Registry

# Key in a student's state dict: [N], for each of its layers whether it is in use. The key `stage` is a number in the
# plan of the run that saved it, which may differ from the plan of the run that loads it.
SEATS = "stage_seats"


@dataclass(frozen=True)
class GrowthPlan:
    """The seats of every stage, and the copies between two stages.

    Attributes:
        stages: for each stage the seats in use, in the order of the forward pass.
        growths: for each growth the pairs (source seat, new seat); one growth fewer than stages.
    """

    stages: tuple[tuple[int, ...], ...]
    growths: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of layers in use at each stage."""
        return tuple(len(seats) for seats in self.stages)

    def uses(self, stage: int) -> list[bool]:
        """For each seat, whether the stage (from 0) uses it. A checkpoint saves this list."""
        return [seat in self.stages[stage] for seat in self.stages[-1]]

    def stage_that_uses(self, seats: list) -> int | None:
        """The stage (from 0) for which `uses` returns the list `seats`, or None."""
        return next((stage for stage in range(len(self.stages)) if self.uses(stage) == seats), None)


@dataclass(frozen=True)
class GrowthMethod:
    """How a student grows.

    Attributes:
        next_stack: a function of (stack, block, layers) that returns the stack of the next stage. A stack is a list of
            layer numbers, from bottom to top. Where the next stack repeats a number, it has a copy of that layer.
            `block` is K, the depth of the first stage; `layers` is the depth of the last one.
        parts: a function that returns the number by which `layers` is divided to get K, from the number of stages.
        parts_text: `parts` as a text for errors, with {} for the number of stages.
    """

    next_stack: Callable[[list[int], int, int], Sequence[int]]
    parts: Callable[[int], int] = lambda stages: stages
    parts_text: str = "{}"


METHODS = Registry("model.stack_method", entry=GrowthMethod)


@METHODS.register("none")
def _none(stack: list[int], block: int, layers: int) -> list[int]:
    """All layers are in use from the start."""
    return stack


@METHODS.register("interleaved")
def _interleaved(stack: list[int], block: int, layers: int) -> list[int]:
    """After stage b, a copy of every b-th layer goes right behind its original.

    Kim & Lee, "Fast Speech Foundation Model Distillation Using Interleaved Stacking",
    Interspeech 2026.
    """
    every = len(stack) // block
    return [layer for place, layer in enumerate(stack, start=1) for _ in range(1 if place % every else 2)]


@METHODS.register("gradual")
def _gradual(stack: list[int], block: int, layers: int) -> list[int]:
    """A copy of the last K layers goes on top.

    Gradual stacking (GradStack): Reddi et al., "Efficient Training of Language Models using
    Few-Shot Learning", ICML 2023, after Gong et al. 2019.
    """
    return stack + stack[-block:]


@METHODS.register("midas")
def _midas(stack: list[int], block: int, layers: int) -> list[int]:
    """A copy of the middle block of K layers goes right behind it. Of n blocks the middle one is ceil(n / 2).

    Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024.
    """
    blocks = len(stack) // block
    end = (blocks + 1) // 2 * block
    return stack[:end] + stack[end - block :]


@METHODS.register("stackbert", parts=lambda stages: 2 ** (stages - 1), parts_text="2 ** ({} - 1)")
def _stackbert(stack: list[int], block: int, layers: int) -> list[int]:
    """A copy of the whole stack goes on top, which doubles the depth.

    Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    return stack + stack


@METHODS.register("gstack")
def _gstack(stack: list[int], block: int, layers: int) -> list[int]:
    """Copies of the whole stack go on top until all layers are in use.

    Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM
    Pre-Training", NeurIPS 2024 (G_stack, depth-wise).
    """
    return stack * (layers // block)


def known_stage(uses: Sequence) -> GrowthPlan:
    """A GrowthPlan for a student that will not grow again. Its growth method need not be registered.

    Args:
        uses: the list that `GrowthPlan.uses` returned for the student's stage.
    """
    seats = tuple(seat for seat, used in enumerate(uses) if used)
    whole = tuple(range(len(uses)))  # the last stage of a plan always uses all seats
    return GrowthPlan(stages=(whole,), growths=()) if seats == whole else GrowthPlan((seats, whole), growths=((),))


def plan_growth(method: str, layers: int, stages: int) -> GrowthPlan:
    """Plan the growth of a student to `layers` layers.

    The student starts with N / B layers and gains N / B at each growth. Two methods differ. `stackbert` starts with
    N / 2 ** (B - 1) layers and doubles at each growth. `gstack` goes from N / B to N layers at once, so it has two
    stages for every B above 1.

    Args:
        method: a name in METHODS; `none` has all layers from the start.
        layers: N, the number of layers of the finished student.
        stages: B, the number of stages.

    Raises:
        InputError: the method is unknown, or it cannot divide the layers into these stages.
    """
    growth_method = METHODS.choose(method)
    if layers < 1 or stages < 1:
        raise InputError(f"model.encoder_layers={layers} and model.stack_stages={stages} must be at least 1")
    if method == "none":
        if stages != 1:
            raise InputError(f"model.stack_stages={stages} has no meaning with model.stack_method=none; set it to 1")
        return GrowthPlan(stages=(tuple(range(layers)),), growths=())
    parts = growth_method.parts(stages)
    if layers % parts:
        divisor = growth_method.parts_text.format(f"model.stack_stages={stages}")
        raise InputError(
            f"model.encoder_layers={layers} is not divisible by {divisor}, as model.stack_method={method} needs;"
            " choose another number of stages"
        )

    block = layers // parts
    # During the simulation layers are numbered in the order in which they are added.
    stack = list(range(block))
    stacks, additions = [stack], []
    while len(stack) < layers:
        grown, pairs = [], []
        wanted = list(growth_method.next_stack(stack, block, layers))
        if list(dict.fromkeys(wanted)) != stack or not len(stack) < len(wanted) <= layers:
            raise InputError(
                f"model.stack_method={method} makes {wanted} of the layers {stack}; a growth must keep them all in"
                f" their order and add copies, up to model.encoder_layers={layers}"
            )
        for layer in wanted:
            if layer in grown:
                source, layer = layer, len(stack) + len(pairs)
                pairs.append((source, layer))
            grown.append(layer)
        stack = grown
        stacks.append(stack)
        additions.append(pairs)
    seat = {layer: index for index, layer in enumerate(stack)}
    return GrowthPlan(
        stages=tuple(tuple(seat[layer] for layer in stack) for stack in stacks),
        growths=tuple(tuple(sorted((seat[source], seat[new]) for source, new in pairs)) for pairs in additions),
    )


def plan_text(config: Any) -> str:
    """The fields of a model's configuration that define its growth plan, as typed on a command line."""
    return f"model.stack_method={config.stack_method} model.stack_stages={config.stack_stages}"


def layers_text(seats: Iterable[int]) -> str:
    """The layers in some seats, by their names in the state dict of the training model."""
    return f"encoder.layers {', '.join(map(str, seats))}"
