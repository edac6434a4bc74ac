"""Windows: the pieces into which long recordings are cut.

A recording is cut into as few windows as cover it, all of the same length, the first at its beginning,
the last at its end and the others evenly between. There are finitely many of them, so that what the
teacher makes of each can be kept (target_store.py).
"""


def count_windows(samples, longest):
    """How many windows of at most `longest` samples a recording has (ints, or integer arrays)."""
    return -(-samples // longest)


def window_start(samples, longest, number):
    """The sample at which window `number` (from 0) of a recording begins."""
    last = count_windows(samples, longest) - 1
    return number * (samples - longest) // last if last else 0
