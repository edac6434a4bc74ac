"""The policy for recordings that cannot be used: skip a few of them, or stop at the first."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fairseq_stack.data.manifest import Manifest, missing_files
from fairseq_stack.errors import InputError, check_choice

logger = logging.getLogger(__name__)

POLICIES = ("skip", "fail")
BAD_AUDIO_LIMIT = 0.01  # unless the user sets another


def check_bad_audio(policy: str, limit: float) -> None:
    """Check task.bad_audio and task.bad_audio_limit.

    Raises:
        InputError: the policy is unknown, or the limit is not a share from 0 to below 1.
    """
    check_choice("task.bad_audio", policy, POLICIES)
    if not 0 <= limit < 1:
        raise InputError(f"task.bad_audio_limit={limit} must be a share of the manifest, 0 or more and below 1")


def listed_problems(manifest: Manifest, shortest: int) -> dict[str, str]:
    """Return the problems of a manifest's recordings that are known without opening a file.

    Args:
        manifest: a Manifest.
        shortest: the samples of one frame.

    Returns:
        {path in the manifest: a line that names the file and its problem}, for files that do not exist and
        for recordings that are shorter than one frame.
    """
    missing = missing_files(manifest)
    problems = {path: f"{os.path.join(manifest.root, path)}: does not exist; prepare again" for path in missing}
    for index in map(int, np.flatnonzero(manifest.samples < shortest)):
        if problem := too_short(manifest.path(index), int(manifest.samples[index]), shortest):
            problems.setdefault(manifest.paths[index], problem)
    return problems


def too_short(path: str | Path, samples: int, shortest: int) -> str | None:
    """Return a line that says that a file has no whole frame; None if it has one."""
    if samples >= shortest:
        return None
    return f"{path}: has {samples} samples at 16 kHz, but one frame takes {shortest}; remove it"


class BadAudio:
    """Counts and logs the recordings of one manifest that cannot be used, each once.

    Every process counts the recordings that it reads itself.

    Args:
        source: the list of the recordings, such as the path of a manifest.
        total: the number of recordings.
        policy: `skip` or `fail`.
        limit: the share of the recordings that may be skipped.
        field: the field or option with which users set the limit.
    """

    def __init__(self, source: str, total: int, policy: str, limit: float, field: str = "task.bad_audio_limit") -> None:
        self.source = source
        self.total = total
        self.allowed = int(limit * total + 1e-9) if policy == "skip" else 0  # 0.29 * 100 is a little less than 29
        self.policy = policy
        self.limit = limit
        self.field = field
        self.seen: set[str] = set()

    def report(self, problems: Mapping[str, str]) -> None:
        """Log recordings as skipped.

        Args:
            problems: {path in the manifest: a line that names the file and its problem}.

        Raises:
            InputError: more recordings cannot be used than the policy allows.
        """
        new = {path: line for path, line in problems.items() if path not in self.seen}
        self.seen.update(new)
        if new and len(self.seen) > self.allowed:
            reason = f"{len(self.seen)} of {self.total} recordings in {self.source} cannot be used"
            if self.policy == "skip":
                reason += f", more than {self.field}={self.limit} of them"
            raise InputError(f"{next(iter(new.values()))} ({reason})")
        for line in new.values():
            logger.warning(f"bad audio | skipped {line}")
