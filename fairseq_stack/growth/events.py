"""A growth as an event: who listens is told right before and right after the student grows."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fairseq_stack.registry import Registry


@dataclass
class Growth:
    """A growth of a student in training.

    Attributes:
        update: updates done.
        model: the student, which changes its `depth` and `stage_number` between the two calls.
        optimizer: fairseq's, which trains it.
        average: the moving average of its weights, or None.
        sample: the batch at hand, with its targets.
        loss: a function without arguments: the loss per frame of that batch, without dropout or gradient.
        folder: where the run keeps its checkpoints.
        copied: after the growth, pairs (source, new) of parameters, of which the second are copies of the first.
    """

    update: int
    model: Any
    optimizer: Any
    average: Any
    sample: dict
    loss: Callable
    folder: str
    copied: list = field(default_factory=list)


class GrowthListener:
    """What is to happen around a growth. Every growth, in every process, makes an object of its own."""

    def before(self, growth):
        """Called before the student grows, with a Growth."""

    def after(self, growth):
        """Called after the student has grown, with the same Growth."""


LISTENERS = Registry("listener")


@contextmanager
def announced(growth):
    """Tell all of LISTENERS, in the order of their registration, before and after the body of a `with` block.

    Args:
        growth: a Growth; the body lets its model grow and sets `copied`.
    """
    listeners = [listener() for listener in LISTENERS.values()]
    for listener in listeners:
        listener.before(growth)
    yield
    for listener in listeners:
        listener.after(growth)
