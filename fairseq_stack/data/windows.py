"""Windows: the pieces into which long recordings are cut.

The windows of a recording all have the same length, and there are as few as cover it. The first is at its
beginning, the last at its end and the others evenly between. Since their number is finite, the teacher's
targets for each can be stored (targets/store.py).
"""

from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)


def count_windows(samples: Count, longest: int) -> Count:
    """Return the number of windows of at most `longest` samples in a recording (ints, or integer arrays)."""
    return -(-samples // longest)


def window_start(samples: int, longest: int, number: int) -> int:
    """Return the sample at which window `number` (from 0) of a recording begins."""
    last = count_windows(samples, longest) - 1
    return number * (samples - longest) // last if last else 0
