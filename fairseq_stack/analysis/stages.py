"""The stages of a training and what an update cost in each, from what the training logged."""

from dataclasses import dataclass
from statistics import median

import numpy as np

from fairseq_stack.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A stretch of a training at one depth.

    Attributes:
        number: 1 for the first.
        depth: transformer layers in use.
        begin: updates done when it began.
        end: updates done when it ended.
    """

    number: int
    depth: int
    begin: int
    end: int

    @property
    def updates(self):
        return self.end - self.begin


def find_stages(stage, depth, last_update):
    """Find where the logged stage changes.

    An entry at update v speaks for the updates since the entry before it, at u. Where it holds the
    stage as it was at v, a growth is placed at u, which is exact when the training grows at a
    multiple of the log interval. Where it holds the average over those updates, the average tells
    the update; roughly, if it is an average over their frames.

    Args:
        stage: Series of the stage, from 1.
        depth: Series of the layers in use, logged with it.
        last_update: updates of the whole training.

    Returns:
        a list of Stage. A stage that no entry shows undivided is not in it.

    Raises:
        InputError: no entry shows an undivided stage.
    """
    whole = np.isclose(stage.values, np.round(stage.values), atol=1e-4)
    numbers = np.unique(np.round(stage.values[whole])).astype(int)
    if not len(numbers):
        raise InputError("the scalar 'stage' is never a whole number; log more often (common.log_interval)")
    begins, depths = [], []
    for number in numbers:
        index = int(np.argmax(whole & (np.round(stage.values) == number)))
        depths.append(int(round(float(depth.values[np.searchsorted(depth.updates, stage.updates[index])]))))
        if not begins:
            begins.append(0)
            continue
        # The first entry that saw any of this stage; the one before it saw none.
        below = numbers[len(begins) - 1]
        index = int(np.argmax(stage.values > below + 1e-4))
        u, v = stage.updates[index - 1], stage.updates[index]
        share = (stage.values[index] - below) / (number - below)
        begins.append(int(round(v - share * (v - u))))
    ends = [*begins[1:], int(last_update)]
    return [Stage(int(n), d, b, e) for n, d, b, e in zip(numbers, depths, begins, ends)]


def seconds_per_update(stages, train, valids=()):
    """Median seconds of an update in each stage, by the clock of the log entries.

    Each two entries of the same start and the same stage give a time. A validation at the first of the two updates
    is taken off; where one falls between them its beginning is unknown, and the pair does not count. What a growth
    takes and the time between two starts do not count. Of pairs that other work on the machine or the writing of a
    checkpoint has made longer, the median takes no notice.

    Args:
        stages: list of Stage.
        train: a Series of the training, one entry per log interval.
        valids: a Series for each validation subset, one entry per validation.

    Returns:
        a list of seconds, one per stage; nan for a stage without two entries to compare.
    """
    clocks = np.concatenate([np.empty(0), *(valid.clock for valid in valids)])
    updates = np.concatenate([np.empty(0), *(valid.updates for valid in valids)])
    found = []
    for stage in stages:
        seconds = []
        inside = np.flatnonzero((train.updates > stage.begin) & (train.updates <= stage.end))
        for i, j in zip(inside, inside[1:]):
            if train.starts[i] != train.starts[j] or train.updates[i] == train.updates[j]:
                continue
            between = (clocks > train.clock[i]) & (clocks <= train.clock[j])
            if (updates[between] != train.updates[i]).any():
                continue
            since = max([train.clock[i], *clocks[between]])
            seconds.append(float(train.clock[j] - since) / int(train.updates[j] - train.updates[i]))
        found.append(median(seconds) if seconds else float("nan"))
    return found


def dearer_stages(stages, costs):
    """Sentences on stages of which an update took longer than one of a deeper stage: other work has slowed them.

    A hundredth of the time is no difference: where updates wait for data, all stages take the same.

    Args:
        stages: list of Stage.
        costs: seconds per update of each stage, nan where unknown.
    """
    found = []
    for shallow, cost in zip(stages, costs):
        pairs = list(zip(stages, costs))
        cheaper = [(other, less) for other, less in pairs if other.depth > shallow.depth and less < 0.99 * cost]
        if cheaper:
            deep, less = min(cheaper, key=lambda pair: pair[1])
            found.append(
                f"stage {shallow.number} took {cost:.3f} s an update with {shallow.depth} layers, and stage"
                f" {deep.number} {less:.3f} s with {deep.depth}"
            )
    return found
