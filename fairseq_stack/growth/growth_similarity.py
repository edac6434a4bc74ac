"""How alike the student's layers were right before and right after each growth: written in training, read for the report."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_stack.errors import InputError
from fairseq_stack.files import write_whole
from fairseq_stack.growth.similarity import layer_similarity

FRAMES = 2000  # of a batch; more would take the training seconds and tell little more
NAME = re.compile(r"growth_at_(\d+)\.json")


@dataclass(frozen=True)
class GrowthSimilarity:
    """Linear CKA between the hidden states of one batch around a growth.

    Attributes:
        update: updates done when the student grew.
        before: [d + 1, d + 1], hidden states 0 to d of the student that it was.
        after: the same of the student that it became.
    """

    update: int
    before: np.ndarray
    after: np.ndarray


def similarity_of(hidden_states, valid):
    """Linear CKA between hidden states on up to FRAMES of their frames, evenly spaced.

    Args:
        hidden_states: d + 1 tensors [B, T, D].
        valid: [B, T] bool, the frames that are no padding.

    Returns:
        [d + 1, d + 1] float64.
    """
    count = int(valid.sum())
    chosen = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)
    return layer_similarity([state[valid][chosen].float().cpu().numpy() for state in hidden_states])


def write_growth(folder, growth):
    """Write a GrowthSimilarity as growth_at_{update}.json, with four digits.

    Raises:
        InputError: the folder cannot be written.
    """
    path = os.path.join(folder, f"growth_at_{growth.update}.json")
    content = {"update": growth.update, "before": growth.before, "after": growth.after}
    text = json.dumps({name: np.round(value, 4).tolist() for name, value in content.items()})
    write_whole(path, text, f"checkpoint.save_dir={folder}")


def read_growths(folder):
    """The list of GrowthSimilarity in a folder, by update; empty where there are none.

    Raises:
        InputError: a file is not what `write_growth` writes.
    """
    growths = []
    for path in Path(folder).glob("growth_at_*.json"):
        if NAME.fullmatch(path.name):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                before, after = (np.array(content[name], dtype=float) for name in ("before", "after"))
                growths.append(GrowthSimilarity(int(content["update"]), before, after))
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(f"{path} is not as the training wrote it; remove it") from None
    return sorted(growths, key=lambda growth: growth.update)
