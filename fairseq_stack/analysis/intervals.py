"""Confidence intervals: of a mean over seeds, and of a score over a test set."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

RESAMPLES = 1000


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns the mean of independent values and the half-width of its interval by Student's t.

    Args:
        values: at least one.
        confidence: the probability that such an interval covers the true mean.

    Returns:
        the mean, and t(n - 1) s / sqrt(n), where s is the sample's standard deviation; nan for a single value.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)


def bootstrap(count: int, score: Callable[[np.ndarray], Any]) -> list[float]:
    """Returns the scores of RESAMPLES resamples of a test set, drawn with replacement.

    The resamples depend on `count` alone. So the resamples of two models belong together, and the differences of their
    scores are resamples of the difference (the paired bootstrap).

    Args:
        count: recordings of the test set.
        score: of the numbers of times that each recording is in the resample, [count].
    """
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return [round(float(score(np.bincount(draw, minlength=count))), 6) for draw in draws]


def percentile_interval(resamples: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the lowest and the highest score of the middle share of the resamples; nan is left out."""
    low, high = np.nanquantile(resamples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
