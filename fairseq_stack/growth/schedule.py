"""At which update each stage begins."""

import math
from dataclasses import dataclass
from fractions import Fraction

from fairseq_stack.errors import InputError, check_choice

SCHEDULES = ("equal", "prop", "milestones", "plateau")


def stage_starts(schedule, stages, max_update, alpha=1.0, milestones=()):
    """First update of each stage, counted from 0.

    `equal` gives each stage the same number of updates; `prop` gives stage b (from 1) a number
    proportional to b ** alpha (PROP-alpha of Saunshi et al. 2024; alpha 0 is `equal`);
    `milestones` lists the first updates of stages 2, 3, ... themselves. `plateau` has the updates of
    `prop`, and they are the latest: a stage may end before, see Plateau.

    Args:
        schedule: one of SCHEDULES.
        stages: number of stages.
        max_update: updates of the whole training.

    Returns:
        a tuple of `stages` update counts, ascending, the first one 0.

    Raises:
        InputError: unknown schedule, alpha out of range, a stage without an update, or milestones that
            do not fit the stages or the training.
    """
    check_choice("model.stack_schedule", schedule, SCHEDULES)
    if stages == 1:
        return (0,)
    if max_update <= 0:
        raise InputError(
            f"optimization.max_update={max_update} must be set: the stages are shares of the updates in all"
        )
    if schedule == "milestones":
        return (0, *_checked_milestones(list(milestones), stages, max_update))
    if not 0 <= alpha <= 100:
        raise InputError(f"model.stack_alpha={alpha} must lie between 0 and 100")
    # Fractions, so that 0.3 of 1,000 updates is 300 and not 299.999.
    weights = [Fraction(1 if schedule == "equal" else stage**alpha) for stage in range(1, stages + 1)]
    starts = [round(max_update * sum(weights[:stage]) / sum(weights)) for stage in range(stages)]
    if len(set(starts)) < stages or starts[-1] >= max_update:
        raise InputError(
            f"optimization.max_update={max_update} is too short for {stages} stages; each needs an update"
        )
    return tuple(starts)


def _checked_milestones(milestones, stages, max_update):
    field = f"model.stack_milestones={milestones}"
    if len(milestones) != stages - 1:
        raise InputError(f"{field} has {len(milestones)} update counts; {stages} stages need {stages - 1}")
    if sorted(set(milestones)) != milestones or milestones[0] < 1:
        raise InputError(f"{field} must be positive and strictly ascending")
    if milestones[-1] >= max_update:
        raise InputError(f"{field} reaches beyond optimization.max_update={max_update}; the last stage needs updates")
    return milestones


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
