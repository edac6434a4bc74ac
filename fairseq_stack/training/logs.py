"""Reads the numbers that a GPU has computed for the log. The CPU waits once for all of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def read(logs: Iterable[dict[str, Any]], *others: Tensor) -> list[float]:
    """Replace the tensors in logs by their numbers, in place.

    Args:
        logs: dicts whose values are numbers, or tensors without dimensions on one device.
        others: more tensors without dimensions on that device.

    Returns:
        the numbers of `others`.
    """
    places = [(log, name) for log in logs for name, value in log.items() if torch.is_tensor(value)]
    tensors = [*others, *(log[name] for log, name in places)]
    numbers = torch.stack(tensors).tolist() if tensors else []
    for (log, name), number in zip(places, numbers[len(others) :]):
        log[name] = number
    return numbers[: len(others)]
