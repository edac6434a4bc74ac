"""The layer weights that the probes of fairseq-stack evaluate have learned, for the report."""

import json
from pathlib import Path

import numpy as np

from fairseq_stack.errors import InputError


def read_layer_weights(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights that probes give to the hidden states, averaged over the seeds.

    Args:
        path: results.json of fairseq-stack evaluate, see evaluation.results.

    Returns:
        {upstream: {task: [N + 1], summing to 1}}, without upstreams that have only one hidden state.

    Raises:
        InputError: the file does not hold such results.
    """
    try:
        weights = {}
        for upstream, entry in json.loads(Path(path).read_text(encoding="utf-8"))["upstreams"].items():
            for task, seeds in entry["tasks"].items():
                mean = np.mean([np.array(seed["layer_weights"], dtype=float) for seed in seeds.values()], axis=0)
                if mean.size > 1:
                    weights.setdefault(upstream, {})[task] = mean
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"--probes {path} has no results of probes; give the JSON that fairseq-stack evaluate wrote"
        ) from None
    if not weights:
        raise InputError(f"--probes {path} has no weights of several hidden states; evaluate an export first")
    return weights
