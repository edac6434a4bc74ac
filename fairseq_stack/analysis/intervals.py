"""A mean over seeds, and how far it can be trusted."""

import math

from scipy.stats import t


def mean_and_interval(values, confidence=0.95):
    """The mean of independent values and the half-width of Student's t interval for it.

    Args:
        values: numbers, at least one.
        confidence: how often such an interval covers the true mean.

    Returns:
        the mean, and t(n - 1) s / sqrt(n) with the sample deviation s; nan for a single value.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
