"""The stages of a training and the seconds of an update in each, from the training's logs."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from fairseq_stack.analysis.scalars import Series
from fairseq_stack.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A part of a training at one depth.

    Attributes:
        number: 1 for the first.
        depth: transformer layers in use.
        begin: updates done at its beginning.
        end: updates done at its end.
    """

    number: int
    depth: int
    begin: int
    end: int

    @property
    def updates(self) -> int:
        return self.end - self.begin


def find_stages(stage: Series, depth: Series, last_update: int) -> list[Stage]:
    """Returns the stages of a training, found where the logged stage changes.

    An entry at update v covers the updates since the previous entry, at u. If the entry holds the stage at v, the
    growth is placed at u. That is exact if the training grows at a multiple of the log interval. If the entry holds
    an average over these updates, the growth is computed from it. That is approximate if the average is over frames.

    Args:
        stage: Series of the stage, from 1.
        depth: Series of the layers in use, logged with it.
        last_update: updates of the whole training.

    Returns:
        the stages, without those that never fill a whole entry.

    Raises:
        InputError: no entry lies in one stage only.
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
        # The first entry with updates of this stage; the previous entry has none.
        below = numbers[len(begins) - 1]
        index = int(np.argmax(stage.values > below + 1e-4))
        u, v = stage.updates[index - 1], stage.updates[index]
        share = (stage.values[index] - below) / (number - below)
        begins.append(int(round(v - share * (v - u))))
    ends = [*begins[1:], int(last_update)]
    return [Stage(int(n), d, b, e) for n, d, b, e in zip(numbers, depths, begins, ends)]


def seconds_per_update(stages: Sequence[Stage], train: Series, valids: Sequence[Series] = ()) -> list[float]:
    """Returns the median seconds of an update in each stage, from the times of the log entries.

    Two successive entries of the same start and the same stage give one time. A validation at the first update of the
    pair is subtracted. If a validation lies between the two updates, its beginning is unknown and the pair is left
    out. Growths and the time between two starts are not counted. The median is robust to pairs that were slowed down
    by other processes or by saving a checkpoint.

    Args:
        stages: of the training.
        train: a Series of the training, one entry per log interval.
        valids: a Series for each validation subset, one entry per validation.

    Returns:
        seconds, one per stage; nan for a stage without such a pair.
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


def slowed_stages(stages: Sequence[Stage], costs: Sequence[float]) -> list[str]:
    """Returns a sentence for each stage whose updates took longer than those of a deeper stage.

    Such a stage was slowed down by other processes. Differences up to 1 % are ignored: if updates wait for data, all
    stages take the same time.

    Args:
        stages: of the training.
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
