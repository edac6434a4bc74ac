"""The similarity of the student's layers right before and after each growth, written by the training for the report."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fairseq_stack.errors import InputError
from fairseq_stack.files import write_whole
from fairseq_stack.growth.similarity import layer_similarity

if TYPE_CHECKING:
    from torch import Tensor

FRAMES = 2000  # of a batch; more frames would cost seconds of training and hardly change the result
NAME = re.compile(r"growth_at_(\d+)\.json")


@dataclass(frozen=True)
class GrowthSimilarity:
    """Linear CKA between the hidden states of one batch around a growth.

    Attributes:
        update: number of updates done when the student grew.
        before: [d + 1, d + 1], between the hidden states 0 to d of the student before the growth.
        after: the same for the student after the growth, with its new depth.
    """

    update: int
    before: np.ndarray
    after: np.ndarray


def similarity_of(hidden_states: "Iterable[Tensor]", valid: "Tensor") -> np.ndarray:
    """Linear CKA between hidden states, computed on at most FRAMES evenly spaced frames.

    Args:
        hidden_states: d + 1 tensors [B, T, D].
        valid: [B, T] bool, false on padding.

    Returns:
        [d + 1, d + 1] float64.
    """
    count = int(valid.sum())
    chosen = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)
    return layer_similarity([state[valid][chosen].float().cpu().numpy() for state in hidden_states])


def write_growth(folder: str | os.PathLike, growth: GrowthSimilarity) -> None:
    """Write a GrowthSimilarity to growth_at_{update}.json in a folder, with four digits.

    Raises:
        InputError: the folder cannot be written.
    """
    path = os.path.join(folder, f"growth_at_{growth.update}.json")
    content = {"update": growth.update, "before": growth.before, "after": growth.after}
    text = json.dumps({name: np.round(value, 4).tolist() for name, value in content.items()})
    write_whole(path, text, f"checkpoint.save_dir={folder}")


def read_growths(folder: str | os.PathLike) -> list[GrowthSimilarity]:
    """Read all GrowthSimilarity files of a folder, sorted by update. The list may be empty.

    Raises:
        InputError: a file has not the content that `write_growth` writes.
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
