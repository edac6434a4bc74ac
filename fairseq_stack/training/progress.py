"""Logs the speed of a training to the progress line and TensorBoard.

The time of an update starts when the training begins to wait for the update's batches, and ends when fairseq logs.
Validation and the writing of checkpoints lie between two updates. The estimate of the time left includes them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.logging import metrics

from fairseq_stack.data.audio import SAMPLE_RATE

# Logged values that differ between two runs of the same configuration.
CLOCKS = ("audio_hours_per_hour", "data_wait_share", "eta_hours")
# The sums that `Progress.count` returns for a batch.
COUNTS = ("audio_samples", "padded_samples", "waited_seconds")
_RECENT = 1000  # the pace is the mean of so many updates, which is enough to include validations by their share

Group = TypeVar("Group")

# In this process: when the current update began and how long it waited for its batches, in seconds.
_update = SimpleNamespace(begin=0.0, waited=0.0)


def timed(groups: Iterable[Group]) -> Iterator[Group]:
    """Yield the groups of batches of an epoch, one for each update, and measure the wait for each."""
    groups = iter(groups)
    while True:
        _update.begin = time.perf_counter()
        group = next(groups, None)
        if group is None:
            return
        _update.waited = time.perf_counter() - _update.begin
        yield group


class Progress:
    """Logs speed, shares of waiting and padding, and the time left of one training."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.ended: float | None = None  # when the last update was logged

    def count(self, sample: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums that a batch adds to the log. fairseq adds them over batches and processes.

        None of them needs a wait for the GPU.
        """
        waited, _update.waited = _update.waited, 0.0  # counted once for the update, not for each of its batches
        return dict(zip(COUNTS, (float(sample["audio_samples"]), float(sample["padded_samples"]), waited)))

    def log(self, sums: Mapping[str, float], depth: int, updates_left: Mapping[int, int]) -> None:
        """Log the update that has just ended.

        Args:
            sums: the sums of the results of `count` over all batches of the update.
            depth: the student's depth in layers.
            updates_left: {depth: updates left at that depth}; empty if the training has no planned end.
        """
        now = time.perf_counter()
        seconds = now - _update.begin
        audio, padded = float(sums["audio_samples"]), float(sums["padded_samples"])
        waited = float(sums["waited_seconds"]) / get_data_parallel_world_size()
        metrics.log_scalar("audio_hours_per_hour", audio / SAMPLE_RATE / seconds, seconds, priority=20, round=1)
        metrics.log_scalar("data_wait_share", waited / seconds, seconds, priority=21, round=3)
        if padded:
            metrics.log_scalar("padding_share", 1 - audio / padded, padded, priority=22, round=3)
        self.pace.observe(depth, now - (self.ended or now))
        self.ended = now
        if self.pace.seconds and updates_left:
            left = sum(updates * self.pace.predict(depth) for depth, updates in updates_left.items())
            metrics.log_scalar("eta_hours", left / 3600, weight=0, priority=23, round=2)


class Pace:
    """Measures the seconds from one update to the next, at each depth.

    Attributes:
        seconds: {depth: mean over the recent updates}.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def observe(self, depth: int, seconds: float) -> None:
        """Count an update. The first at each depth is ignored, because it includes the growth or the warm-up."""
        seen = self._seen[depth] = self._seen.get(depth, -1) + 1
        if seen:
            mean = self.seconds.get(depth, 0.0)
            self.seconds[depth] = mean + (seconds - mean) / min(seen, _RECENT)

    def predict(self, depth: int) -> float:
        """Return the seconds of an update at `depth`.

        A depth without measurements lies on the line through the two deepest measured depths. With one measured depth,
        the result is the time at that depth, which is too short for a deeper one.
        """
        if depth in self.seconds:
            return self.seconds[depth]
        *_, deepest = sorted(self.seconds)
        if len(self.seconds) == 1:
            return self.seconds[deepest]
        second = sorted(self.seconds)[-2]
        slope = (self.seconds[deepest] - self.seconds[second]) / (deepest - second)
        return self.seconds[deepest] + max(slope, 0.0) * (depth - deepest)
