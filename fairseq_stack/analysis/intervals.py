"""A mean over seeds with its confidence interval."""

import math
from collections.abc import Sequence

from scipy.stats import t


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
