"""How fast a training goes: what the progress line and TensorBoard say beside the losses.

Every update has a clock of its own: it starts when the training begins to wait for the update's batches
and stops when fairseq logs. Validation and the writing of checkpoints lie between two updates; the time left
counts them too.
"""

import time
from types import SimpleNamespace

from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.logging import metrics

from fairseq_stack.data.audio import SAMPLE_RATE

# What is logged and never the same in two runs.
CLOCKS = ("audio_hours_per_hour", "data_wait_share", "eta_hours")
# What `Progress.count` tells of a batch.
COUNTS = ("audio_samples", "padded_samples", "waited_seconds")
_RECENT = 1000  # updates that the pace is a mean over: enough for validations to weigh what they cost

# Of this process: when the update at hand began, and how long it waited for its batches, in seconds.
_update = SimpleNamespace(begin=0.0, waited=0.0)


def timed(groups):
    """The groups of batches of an epoch, one for each update, with the wait for each on the update's clock."""
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

    def __init__(self):
        self.pace = Pace()
        self.ended = None  # when the last update had been logged

    def count(self, sample):
        """What a batch adds to the log: sums, as fairseq adds them over accumulation and processes.

        They are known without asking the GPU.
        """
        waited, _update.waited = _update.waited, 0.0  # of the update, not of each of its batches
        return dict(zip(COUNTS, (float(sample["audio_samples"]), float(sample["padded_samples"]), waited)))

    def log(self, sums, depth, updates_left):
        """Log the update that has just ended.

        Args:
            sums: of what `count` returned, over all batches of the update.
            depth: of the student, in layers.
            updates_left: {depth: updates still to do at it}; empty where the training has no planned end.
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
    """Seconds from one update to the next at each depth, as this process has measured them.

    Attributes:
        seconds: {depth: mean over the recent updates}.
    """

    def __init__(self):
        self.seconds = {}
        self._seen = {}

    def observe(self, depth, seconds):
        """Take in an update; the first at each depth is left out, which pays for the growth or warms up."""
        seen = self._seen[depth] = self._seen.get(depth, -1) + 1
        if seen:
            mean = self.seconds.get(depth, 0.0)
            self.seconds[depth] = mean + (seconds - mean) / min(seen, _RECENT)

    def predict(self, depth):
        """Seconds of an update at `depth`: measured, else on the line through the two deepest that are.

        From one measured depth nothing can be told about another, which is then taken to cost as much: less
        than it will.
        """
        if depth in self.seconds:
            return self.seconds[depth]
        *_, deepest = sorted(self.seconds)
        if len(self.seconds) == 1:
            return self.seconds[deepest]
        second = sorted(self.seconds)[-2]
        slope = (self.seconds[deepest] - self.seconds[second]) / (deepest - second)
        return self.seconds[deepest] + max(slope, 0.0) * (depth - deepest)
