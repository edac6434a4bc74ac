"""Where the time of an update goes."""

import time
from contextlib import contextmanager

import torch

REST = "rest"


class Clock:
    """Seconds spent in named parts. A part within a part counts for the inner one; what is in none is REST.

    Args:
        device: a GPU is waited for whenever a part begins or ends.
        now: seconds since some beginning.
    """

    def __init__(self, device, now=time.perf_counter):
        self.now = now
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.spent = {}
        self.parts = [REST]
        self.since = None

    @contextmanager
    def __call__(self, part):
        self._charge()
        self.parts.append(part)
        try:
            yield
            self._charge()
        finally:  # whoever has run out of memory may go on with less
            self.parts.pop()

    def wrap(self, owner, method, part):
        """Let a method of an object count for a part."""
        inner = getattr(owner, method)

        def timed(*args, **options):
            with self(part):
                return inner(*args, **options)

        setattr(owner, method, timed)

    def restart(self):
        self._charge()
        self.spent = {}

    def stop(self):
        """{part: seconds} since `restart`."""
        self._charge()
        return self.spent

    def _charge(self):
        self.wait()
        now = self.now()
        if self.since is not None:
            self.spent[self.parts[-1]] = self.spent.get(self.parts[-1], 0.0) + now - self.since
        self.since = now
