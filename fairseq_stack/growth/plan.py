"""Which layers are copied where at each growth, as data.

Every layer of the full student has a seat, 0 to N - 1, from the first update to the last. A stage
uses some of the seats, in ascending order; a growth wakes idle seats, each with a copy of a layer
that is already in use. The seats follow from simulating the whole growth once, so that the layer
in `encoder.layers.7` never has to move.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fairseq_stack.errors import InputError
from fairseq_stack.registry import Registry

# Beside the weights of a student: for each of its layers whether it is in use, [N] bool. The stage beside it counts
# in the plan of the run that saved it.
SEATS = "stage_seats"


@dataclass(frozen=True)
class GrowthPlan:
    """The seats of every stage, and the copies between two stages.

    Attributes:
        stages: for each stage the seats in use, in the order of the forward pass.
        growths: for each growth the pairs (source seat, woken seat); one fewer than the stages.
    """

    stages: tuple[tuple[int, ...], ...]
    growths: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def depths(self):
        """Layers in use at each stage."""
        return tuple(len(seats) for seats in self.stages)

    def uses(self, stage):
        """For each seat whether the stage (from 0) has it in use: what a checkpoint says of its layers."""
        return [seat in self.stages[stage] for seat in self.stages[-1]]

    def stage_that_uses(self, seats):
        """The stage (from 0) for which `uses` gives the list `seats`, or None."""
        return next((stage for stage in range(len(self.stages)) if self.uses(stage) == seats), None)


@dataclass(frozen=True)
class GrowthMethod:
    """How a student grows.

    Attributes:
        next_stack: a function of (stack, block, layers): the next stack, from bottom to top, out of the present one,
            a list of numbers. Where a number is named again, a copy of its layer will stand. `block` is K, the depth
            of the first stage, `layers` that of the last.
        parts: a function of the number of stages: `layers` divided by it is K.
        parts_text: the same for an error, with {} for the stages.
    """

    next_stack: Callable
    parts: Callable = lambda stages: stages
    parts_text: str = "{}"


METHODS = Registry("model.stack_method", entry=GrowthMethod)


@METHODS.register("none")
def _none(stack, block, layers):
    """All layers are there from the start."""
    return stack


@METHODS.register("interleaved")
def _interleaved(stack, block, layers):
    """After stage b, a copy of every b-th layer goes right behind its original.

    Kim & Lee, "Fast Speech Foundation Model Distillation Using Interleaved Stacking",
    Interspeech 2026.
    """
    every = len(stack) // block
    return [layer for place, layer in enumerate(stack, start=1) for _ in range(1 if place % every else 2)]


@METHODS.register("gradual")
def _gradual(stack, block, layers):
    """A copy of the last K layers goes on top.

    Gradual stacking (GradStack): Reddi et al., "Efficient Training of Language Models using
    Few-Shot Learning", ICML 2023, after Gong et al. 2019.
    """
    return stack + stack[-block:]


@METHODS.register("midas")
def _midas(stack, block, layers):
    """A copy of the middle block of K layers goes right behind it; of n blocks, block ceil(n / 2).

    Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024.
    """
    blocks = len(stack) // block
    end = (blocks + 1) // 2 * block
    return stack[:end] + stack[end - block :]


@METHODS.register("stackbert", parts=lambda stages: 2 ** (stages - 1), parts_text="2 ** ({} - 1)")
def _stackbert(stack, block, layers):
    """A copy of the whole stack goes on top, which doubles it.

    Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    return stack + stack


@METHODS.register("gstack")
def _gstack(stack, block, layers):
    """Copies of the whole stack go on top until all layers are in use.

    Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM
    Pre-Training", NeurIPS 2024 (G_stack, depth-wise).
    """
    return stack * (layers // block)


def known_stage(uses):
    """A GrowthPlan for a student that grows no more, whose method need not be known.

    Args:
        uses: what `GrowthPlan.uses` gave for its stage.
    """
    seats = tuple(seat for seat, used in enumerate(uses) if used)
    whole = tuple(range(len(uses)))  # which the last stage of a plan has to be
    return GrowthPlan(stages=(whole,), growths=()) if seats == whole else GrowthPlan((seats, whole), growths=((),))


def plan_growth(method, layers, stages):
    """Plan the growth of a student to `layers` layers.

    Args:
        method: a name in METHODS; `none` has all layers from the start.
        layers: N, the layers of the finished student.
        stages: B. The student starts with N / B layers and gains as many at each growth, except
            with `stackbert`, which starts with N / 2 ** (B - 1) and doubles, and `gstack`, which
            goes from N / B to N at once and so has two stages however large B is.

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
    # A layer is known by its order of birth while the growth is being simulated.
    stack = list(range(block))
    stacks, births = [stack], []
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
        births.append(pairs)
    seat = {layer: index for index, layer in enumerate(stack)}
    return GrowthPlan(
        stages=tuple(tuple(seat[layer] for layer in stack) for stack in stacks),
        growths=tuple(tuple(sorted((seat[source], seat[born]) for source, born in pairs)) for pairs in births),
    )


def plan_text(config):
    """The fields that make the growth plan of a model's configuration, as one types them."""
    return f"model.stack_method={config.stack_method} model.stack_stages={config.stack_stages}"


def layers_text(seats):
    """Layers of the training model by their names in its state dict."""
    return f"encoder.layers {', '.join(map(str, seats))}"
