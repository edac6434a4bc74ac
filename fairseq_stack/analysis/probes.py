"""What the probes of scripts/evaluate.py have learned, for the report."""

import json
from pathlib import Path

import numpy as np

from fairseq_stack.errors import InputError


def read_layer_weights(path):
    """The weights that probes give to the hidden states, means over their seeds.

    Args:
        path: JSON that scripts/evaluate.py writes: a list of results, each with `upstream`, `task`, `seed`
            and `layer_weights`, one for each hidden state.

    Returns:
        {upstream: {task: [N + 1], summing to 1}}, without upstreams that have one hidden state only.

    Raises:
        InputError: the file is something else.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        seeds = {}
        for result in results:
            if len(result["layer_weights"]) > 1:
                seeds.setdefault(result["upstream"], {}).setdefault(result["task"], []).append(result["layer_weights"])
        weights = {
            upstream: {task: np.mean(np.array(lists, dtype=float), axis=0) for task, lists in tasks.items()}
            for upstream, tasks in seeds.items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--probes {path} is no list of results; give the JSON that scripts/evaluate.py wrote") from None
    if not weights:
        raise InputError(f"--probes {path} has no weights of several hidden states; evaluate an export first")
    return weights
