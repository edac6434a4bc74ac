"""The update at which each stage begins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fairseq_stack.errors import InputError
from fairseq_stack.registry import Registry


@dataclass(frozen=True)
class Schedule:
    """When the stages begin.

    Attributes:
        starts: a function of (stages, max_update, alpha, milestones), as in `stage_starts`. It returns the first update
            of each stage, ascending from 0.
        ends_early: whether a stage may end before the next one's first update, see Plateau.
    """

    starts: Callable[[int, int, float, Sequence[int]], Sequence[int]]
    ends_early: bool = False


SCHEDULES = Registry("model.stack_schedule", entry=Schedule)


@SCHEDULES.register("equal")
def _equal(stages: int, max_update: int, alpha: float, milestones: Sequence[int]) -> list[int]:
    return _shares(stages, max_update, alpha, exponent=0)


@SCHEDULES.register("prop")
def _prop(stages: int, max_update: int, alpha: float, milestones: Sequence[int]) -> list[int]:
    return _shares(stages, max_update, alpha, exponent=alpha)


@SCHEDULES.register("milestones")
def _milestones(stages: int, max_update: int, alpha: float, milestones: Sequence[int]) -> list[int]:
    milestones = list(milestones)
    field = f"model.stack_milestones={milestones}"
    if len(milestones) != stages - 1:
        raise InputError(f"{field} has {len(milestones)} update counts; {stages} stages need {stages - 1}")
    if sorted(set(milestones)) != milestones or milestones[0] < 1:
        raise InputError(f"{field} must be positive and strictly ascending")
    if milestones[-1] >= max_update:
        raise InputError(f"{field} reaches beyond optimization.max_update={max_update}; the last stage needs updates")
    return [0, *milestones]


@SCHEDULES.register("plateau", ends_early=True)
def _plateau(stages: int, max_update: int, alpha: float, milestones: Sequence[int]) -> list[int]:
    return _prop(stages, max_update, alpha, milestones)


def _shares(stages: int, max_update: int, alpha: float, exponent: float) -> list[int]:
    """First updates of the stages, where stage b (from 1) gets updates in proportion to b ** exponent."""
    if not 0 <= alpha <= 100:
        raise InputError(f"model.stack_alpha={alpha} must lie between 0 and 100")
    # Fractions are exact: 0.3 of 1,000 updates is 300 and not 299.999.
    weights = [Fraction(stage**exponent) for stage in range(1, stages + 1)]
    return [round(max_update * sum(weights[:stage]) / sum(weights)) for stage in range(stages)]


def stage_starts(
    schedule: str, stages: int, max_update: int, alpha: float = 1.0, milestones: Sequence[int] = ()
) -> tuple[int, ...]:
    """First update of each stage, counted from 0.

    - `equal` gives each stage the same number of updates.
    - `prop` gives stage b (from 1) a number of updates proportional to b ** alpha (PROP-alpha of Saunshi et al. 2024;
      alpha 0 is `equal`).
    - `milestones` lists the first updates of stages 2, 3, ... themselves.
    - `plateau` begins each stage at the latest where `prop` does. A stage may end earlier, see Plateau.

    Args:
        schedule: a name in SCHEDULES.
        stages: number of stages.
        max_update: updates of the whole training.
        alpha: exponent of `prop` and `plateau`, from 0 to 100.
        milestones: first updates of stages 2, 3, ..., for `milestones` only.

    Returns:
        a tuple of `stages` update counts, ascending, the first one 0.

    Raises:
        InputError: the schedule is unknown, alpha is out of range, a stage would have no update, or the
            milestones do not fit the stages or the training.
    """
    starts_of = SCHEDULES.choose(schedule).starts
    if stages == 1:
        return (0,)
    if max_update <= 0:
        raise InputError(
            f"optimization.max_update={max_update} must be set: the stages are shares of all updates of the training"
        )
    starts = list(starts_of(stages, max_update, alpha, milestones))
    if len(starts) != stages or starts[0] != 0:
        raise InputError(
            f"model.stack_schedule={schedule} gives {stages} stages the starts {starts}; give each one, from 0 on"
        )
    if sorted(set(starts)) != starts or starts[-1] >= max_update:
        raise InputError(f"optimization.max_update={max_update} is too short for {stages} stages; each needs an update")
    return tuple(starts)


def stage_at(update: int, starts: Sequence[int]) -> int:
    """The stage (from 0) that trains at `update`, the number of updates already done."""
    return sum(start <= update for start in starts) - 1


@dataclass
class Plateau:
    """Whether the validation loss of the current stage has stopped falling.

    Attributes:
        patience: a stage ends after this many validations in a row without a lower loss.
        min_updates: a stage does not end before this many updates of its own.
        start: update at which the stage began.
        best: lowest validation loss of the stage.
        waited: number of validations since the lowest loss.
        seen: update of the last validation.

    Raises:
        InputError: a patience below 1, or negative updates.
    """

    patience: int
    min_updates: int = 0
    start: int = 0
    best: float = math.inf
    waited: int = 0
    seen: int = -1

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise InputError(f"model.stack_patience={self.patience} must be at least 1")
        if self.min_updates < 0:
            raise InputError(f"model.stack_min_updates={self.min_updates} must be 0 or more")

    @property
    def reached(self) -> bool:
        """Whether the stage should end now."""
        return self.waited >= self.patience and self.seen - self.start >= self.min_updates

    def observe(self, update: int, loss: float) -> None:
        """Record the validation loss at `update`. If there are several at one update, only the first counts."""
        if update == self.seen:
            return
        self.seen = update
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1

    def begin(self, update: int) -> None:
        """Start a new stage at `update` and forget the losses of the one before, which had another depth."""
        self.start, self.best, self.waited = update, math.inf, 0

    @property
    def state(self) -> list[float]:
        """The four numbers that a checkpoint keeps: start, best, waited, seen."""
        return [self.start, self.best, self.waited, self.seen]

    @state.setter
    def state(self, state: Sequence[float]) -> None:
        start, self.best, waited, seen = state
        self.start, self.waited, self.seen = int(start), int(waited), int(seen)
