"""What the probes of fairseq-stack evaluate have learned, for the report."""

import json
from pathlib import Path

import numpy as np

from fairseq_stack.errors import InputError


def read_layer_weights(path):
    """The weights that probes give to the hidden states, means over their seeds.

    Args:
        path: JSON that fairseq-stack evaluate writes; under `upstreams`, name, `tasks`, task and seed it has
            `layer_weights`, one for each hidden state.

    Returns:
        {upstream: {task: [N + 1], summing to 1}}, without upstreams that have one hidden state only.

    Raises:
        InputError: the file is something else.
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
