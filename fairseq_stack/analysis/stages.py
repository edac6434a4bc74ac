"""The stages of a training and what an update cost in each, from what the training logged."""

from dataclasses import dataclass

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


def seconds_per_update(stages, train, valid=None):
    """Seconds that one update took in each stage, by the clock of the log entries.

    Counted is the time between two entries of the same start and the same stage. A validation at
    the first of the two updates is taken off; where one falls between them its beginning is
    unknown, and the pair does not count. What a growth takes and the time between two starts do
    not count; the writing of checkpoints does.

    Args:
        stages: list of Stage.
        train: a Series of the training, one entry per log interval.
        valid: a Series of the validation, one entry per validation; None where there was none.

    Returns:
        a list of seconds, one per stage; nan for a stage without two entries to compare.
    """
    found = []
    for stage in stages:
        seconds, updates = 0.0, 0
        inside = np.flatnonzero((train.updates > stage.begin) & (train.updates <= stage.end))
        for i, j in zip(inside, inside[1:]):
            if train.starts[i] != train.starts[j]:
                continue
            since = train.clock[i]
            if valid is not None:
                between = (valid.clock > train.clock[i]) & (valid.clock <= train.clock[j])
                if (valid.updates[between] != train.updates[i]).any():
                    continue
                since = max([since, *valid.clock[between]])
            seconds += float(train.clock[j] - since)
            updates += int(train.updates[j] - train.updates[i])
        found.append(seconds / updates if updates else float("nan"))
    return found
