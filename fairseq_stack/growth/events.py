"""Growth as an event: listeners are called when a student is built, and right before and right after it grows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fairseq_stack.registry import Registry


@dataclass
class Growth:
    """A growth of a student in training.

    Attributes:
        update: number of updates done.
        model: the student. Its `depth` and `stage_number` change between the two calls.
        optimizer: the fairseq optimizer that trains the student.
        average: fairseq's moving average of the student's weights, or None.
        sample: the batch of this update, with its targets.
        loss: a function without arguments that returns the loss per frame of that batch, without dropout or gradient.
        folder: the run's folder of checkpoints.
        copied: after the growth, a ParameterPair (surgery.py) for each new parameter.
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
    """Base class of what runs around a growth. Every process makes a new object for every growth and for the start."""

    def start(self, model: Any) -> None:
        """Run on a new student, before a checkpoint is loaded into it."""

    def before(self, growth: Growth) -> None:
        """Run before the student grows."""

    def after(self, growth: Growth) -> None:
        """Run after the student has grown, with the same Growth."""


LISTENERS: Registry[Callable[[], GrowthListener]] = Registry("listener")


def announce_start(model: Any) -> None:
    """Call `start` of all LISTENERS, in the order of their registration."""
    for listener in LISTENERS.values():
        listener().start(model)


@contextmanager
def announced(growth: Growth) -> Iterator[None]:
    """Call all LISTENERS, in the order of their registration, before and after the body of a `with` block.

    Args:
        growth: a Growth. The body lets its model grow and sets `copied`.
    """
    listeners = [listener() for listener in LISTENERS.values()]
    for listener in listeners:
        listener.before(growth)
    yield
    for listener in listeners:
        listener.after(growth)
