"""Resampling in blocks, so that a recording of hours takes no more memory than one of minutes.

The filter is the default of torchaudio.functional.resample: a sinc with six zero crossings on each side under a Hann
window, which passes 99 % of the lower band. scipy's polyphase filter computes the same sums. torchaudio itself
resamples only a whole recording at once, and torch alone takes half a gigabyte in each process.
"""

from collections.abc import Iterable, Iterator
from math import gcd

import numpy as np
from scipy.signal import upfirdn

ZERO_CROSSINGS = 6
PASSED = 0.99  # of the lower of the two Nyquist frequencies


def resample(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Yield a signal at another rate, in blocks that together equal the resampled whole.

    Args:
        blocks: float32 arrays [samples], the signal's consecutive parts.
        rate, new_rate: in Hz.

    Yields:
        float32 arrays [samples]; all together ceil(new_rate * samples / rate) samples.
    """
    divisor = gcd(rate, new_rate)
    step, made = rate // divisor, new_rate // divisor  # `step` samples become `made` samples
    if step == made:
        yield from blocks
        return
    taps, delay = _filter(step, made)
    margin = -(-delay // made) * step  # samples that the filter sees on either side, in whole steps
    known, pending = 0, np.empty(0, dtype=np.float32)  # the first `known` pending samples are resampled already
    for block in blocks:
        pending = np.concatenate([pending, block])
        ready = (len(pending) - margin) // step * step
        if ready > known:
            resampled = upfirdn(taps, pending[: ready + margin], made, step)
            yield resampled[delay + known // step * made : delay + ready // step * made]
            dropped = max(ready - margin, 0)
            known, pending = ready - dropped, pending[dropped:]
    total = -(-len(pending) * made // step)
    yield upfirdn(taps, pending, made, step)[delay + known // step * made : delay + total]


def _filter(step: int, made: int) -> tuple[np.ndarray, int]:
    """Return the low-pass filter at `made` times the old rate, float32, and its delay in samples of the new rate."""
    cutoff = PASSED * min(step, made)
    reach = int(ZERO_CROSSINGS * step * made / cutoff)
    delay = -(-reach // step)
    position = np.arange(-delay * step, delay * step + 1) * cutoff / (step * made)
    window = np.cos(np.clip(position, -ZERO_CROSSINGS, ZERO_CROSSINGS) * np.pi / ZERO_CROSSINGS / 2) ** 2
    return (np.sinc(position) * window * cutoff / step).astype(np.float32), delay
