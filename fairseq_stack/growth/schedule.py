"""At which update each stage begins."""

from fractions import Fraction

from fairseq_stack.errors import InputError

SCHEDULES = ("equal", "prop", "milestones")


def stage_starts(schedule, stages, max_update, alpha=1.0, milestones=()):
    """First update of each stage, counted from 0.

    `equal` gives each stage the same number of updates; `prop` gives stage b (from 1) a number
    proportional to b ** alpha (PROP-alpha of Saunshi et al. 2024; alpha 0 is `equal`);
    `milestones` lists the first updates of stages 2, 3, ... themselves.

    Args:
        schedule: one of SCHEDULES.
        stages: number of stages.
        max_update: updates of the whole training.

    Returns:
        a tuple of `stages` update counts, ascending, the first one 0.

    Raises:
        InputError: unknown schedule, negative alpha, a stage without an update, or milestones that
            do not fit the stages or the training.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"model.stack_schedule={schedule} is unknown; choose from {', '.join(SCHEDULES)}")
    if stages == 1:
        return (0,)
    if max_update <= 0:
        raise InputError(
            f"optimization.max_update={max_update} must be set: the stages are shares of the updates in all"
        )
    if schedule == "milestones":
        return (0, *_checked_milestones(list(milestones), stages, max_update))
    if alpha < 0:
        raise InputError(f"model.stack_alpha={alpha} must be 0 or more")
    # Fractions, so that 0.3 of 1,000 updates is 300 and not 299.999.
    weights = [Fraction(stage**alpha if schedule == "prop" else 1) for stage in range(1, stages + 1)]
    starts = [round(max_update * sum(weights[:stage]) / sum(weights)) for stage in range(stages)]
    if len(set(starts)) < stages or starts[-1] >= max_update:
        raise InputError(
            f"optimization.max_update={max_update} is too short for model.stack_stages={stages}:"
            " every stage needs an update"
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
