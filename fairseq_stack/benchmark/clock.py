"""Measures the parts of an update's time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REST = "rest"


class Clock:
    """Seconds spent in named parts. Time in nested parts counts for the inner part; time outside of all is REST.

    Args:
        device: if it is a GPU, the clock waits for it at the beginning and the end of each part.
        now: returns the time. An array of counters works, too.
    """

    def __init__(self, device: torch.device, now: Callable[[], Any] = time.perf_counter):
        self.now = now
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.spent: dict[str, Any] = {}
        self.parts = [REST]
        self.since: Any = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._charge()
        self.parts.append(part)
        try:
            yield
            self._charge()
        finally:  # after it runs out of memory, a training may continue with a smaller depth
            self.parts.pop()

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Replaces a method of an object by one whose time counts for a part."""
        untimed = getattr(owner, method)

        def timed(*args, **options):
            with self(part):
                return untimed(*args, **options)

        setattr(owner, method, timed)

    def restart(self) -> None:
        """Sets the seconds of all parts to 0."""
        self._charge()
        self.spent = {}

    def stop(self) -> dict[str, Any]:
        """Returns {part: seconds} since `restart`."""
        self._charge()
        return self.spent

    def _charge(self):
        self.wait()
        now = self.now()
        if self.since is not None:
            self.spent[self.parts[-1]] = self.spent.get(self.parts[-1], 0.0) + now - self.since
        self.since = now
