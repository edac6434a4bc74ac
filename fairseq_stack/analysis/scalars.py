"""The scalars of a training, from the TensorBoard event files that fairseq writes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import (
    SCALARS,
    EventAccumulator,
)

from fairseq_stack.errors import InputError


@dataclass(frozen=True)
class Series:
    """One scalar over a training, with its E entries in the order of the updates.

    Attributes:
        updates: [E] int64, optimiser updates done.
        clock: [E] float64, when the entry was written, in seconds since 1970.
        values: [E] float64.
        starts: [E] int64, the number of the start (from 0) that wrote the entry. Between two starts the clock runs
            without training.
    """

    updates: np.ndarray
    clock: np.ndarray
    values: np.ndarray
    starts: np.ndarray


def read_scalars(folder: str | Path) -> dict[str, Series]:
    """Returns every scalar that fairseq logged under one tag, such as RUN/tensorboard/train_inner, by its name.

    Each start of a training adds one event file. A resumed training repeats the updates after its checkpoint; the
    entries that an earlier start logged for these updates are left out. A truncated file is read up to its end.

    Raises:
        InputError: the folder has no event file, or none that holds scalars.
    """
    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    if not files:
        raise InputError(f"{folder} has no TensorBoard event files; set common.tensorboard_logdir in the training")
    starts = []
    for file in files:
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()[SCALARS]}
        if scalars:
            starts.append(scalars)
    if not starts:
        raise InputError(f"{folder} has event files without scalars; train until the first log entry")
    # File names have whole seconds and a host name, so the starts are sorted by the times of their entries.
    starts.sort(key=lambda scalars: min(events[0].wall_time for events in scalars.values()))

    entries = {}
    next_start = float("inf")  # first update of the start after this one
    for number, scalars in reversed(list(enumerate(starts))):
        for tag, events in scalars.items():
            kept = [(event.step, event.wall_time, event.value, number) for event in events if event.step < next_start]
            entries.setdefault(tag, []).extend(kept)
        next_start = min(next_start, min(events[0].step for events in scalars.values()))
    series = {}
    for tag, rows in entries.items():
        if rows:
            updates, clock, values, numbers = zip(*sorted(rows))
            series[tag] = Series(np.array(updates), np.array(clock), np.array(values), np.array(numbers))
    return series
