"""At which update each stage begins."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from fairseq_stack.errors import InputError
from fairseq_stack.registry import Registry


@dataclass(frozen=True)
class Schedule:
    """When the stages begin.

    Attributes:
        starts: a function of (stages, max_update, alpha, milestones), which are as in `stage_starts`: the first update
            of each stage, ascending from 0.
        ends_early: whether a stage may end before, see Plateau.
    """

    starts: Callable
    ends_early: bool = False


SCHEDULES = Registry("model.stack_schedule", entry=Schedule)


@SCHEDULES.register("equal")
def _equal(stages, max_update, alpha, milestones):
    return _shares(stages, max_update, alpha, exponent=0)


@SCHEDULES.register("prop")
def _prop(stages, max_update, alpha, milestones):
    return _shares(stages, max_update, alpha, exponent=alpha)


@SCHEDULES.register("milestones")
def _milestones(stages, max_update, alpha, milestones):
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
def _plateau(stages, max_update, alpha, milestones):
    return _prop(stages, max_update, alpha, milestones)


def _shares(stages, max_update, alpha, exponent):
    """Stage b, from 1, has updates in proportion to b ** exponent."""
    if not 0 <= alpha <= 100:
        raise InputError(f"model.stack_alpha={alpha} must lie between 0 and 100")
    # Fractions, so that 0.3 of 1,000 updates is 300 and not 299.999.
    weights = [Fraction(stage**exponent) for stage in range(1, stages + 1)]
    return [round(max_update * sum(weights[:stage]) / sum(weights)) for stage in range(stages)]


def stage_starts(schedule, stages, max_update, alpha=1.0, milestones=()):
    """First update of each stage, counted from 0.

    `equal` gives each stage the same number of updates; `prop` gives stage b (from 1) a number
    proportional to b ** alpha (PROP-alpha of Saunshi et al. 2024; alpha 0 is `equal`);
    `milestones` lists the first updates of stages 2, 3, ... themselves. `plateau` has the updates of
    `prop`, and they are the latest: a stage may end before, see Plateau.

    Args:
        schedule: a name in SCHEDULES.
        stages: number of stages.
        max_update: updates of the whole training.

    Returns:
        a tuple of `stages` update counts, ascending, the first one 0.

    Raises:
        InputError: unknown schedule, alpha out of range, a stage without an update, or milestones that
            do not fit the stages or the training.
    """
    starts_of = SCHEDULES.choose(schedule).starts
    if stages == 1:
        return (0,)
    if max_update <= 0:
        raise InputError(
            f"optimization.max_update={max_update} must be set: the stages are shares of the updates in all"
        )
    starts = list(starts_of(stages, max_update, alpha, milestones))
    if len(starts) != stages or starts[0] != 0:
        raise InputError(
            f"model.stack_schedule={schedule} gives {stages} stages the starts {starts}; give each one, from 0 on"
        )
    if sorted(set(starts)) != starts or starts[-1] >= max_update:
        raise InputError(f"optimization.max_update={max_update} is too short for {stages} stages; each needs an update")
    return tuple(starts)


def stage_at(update, starts):
    """The stage, from 0, that trains at `update` (the number of updates already done)."""
    return sum(start <= update for start in starts) - 1


@dataclass
class Plateau:
    """Whether the validation loss of the current stage has stopped falling.

    Attributes:
        patience: validations in a row without a lower loss that end a stage.
        min_updates: updates of a stage before which it does not end.
        start: update at which the stage began.
        best: lowest validation loss of the stage.
        waited: validations since then.
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

    def __post_init__(self):
        if self.patience < 1:
            raise InputError(f"model.stack_patience={self.patience} must be at least 1")
        if self.min_updates < 0:
            raise InputError(f"model.stack_min_updates={self.min_updates} must be 0 or more")

    @property
    def reached(self):
        """Whether the stage should end now."""
        return self.waited >= self.patience and self.seen - self.start >= self.min_updates

    def observe(self, update, loss):
        """Take in the validation loss at `update`; of several at one update the first counts."""
        if update == self.seen:
            return
        self.seen = update
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1

    def begin(self, update):
        """A stage begins at `update`: forget the losses of the one before, which had another depth."""
        self.start, self.best, self.waited = update, math.inf, 0

    @property
    def state(self):
        """What a checkpoint keeps, four numbers: start, best, waited, seen."""
        return [self.start, self.best, self.waited, self.seen]

    @state.setter
    def state(self, state):
        start, self.best, waited, seen = state
        self.start, self.waited, self.seen = int(start), int(waited), int(seen)
