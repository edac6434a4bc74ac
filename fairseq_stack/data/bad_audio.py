"""What to do about recordings that cannot be used: skip a few of them, or stop at the first."""

import logging
import os

from fairseq_stack.data.manifest import missing_files
from fairseq_stack.errors import InputError, check_choice

logger = logging.getLogger(__name__)

POLICIES = ("skip", "fail")
BAD_AUDIO_LIMIT = 0.01  # unless the user sets another


def check_bad_audio(policy, limit):
    """Check task.bad_audio and task.bad_audio_limit.

    Raises:
        InputError: the policy is unknown, or the limit is no share.
    """
    check_choice("task.bad_audio", policy, POLICIES)
    if not 0 <= limit < 1:
        raise InputError(f"task.bad_audio_limit={limit} must be a share of the manifest, 0 or more and below 1")


def listed_problems(manifest, shortest):
    """What is known of a manifest's recordings without opening a file.

    Args:
        manifest: a Manifest.
        shortest: the samples that one frame takes.

    Returns:
        {path in the manifest: a line that names the file and says what is wrong}, for those that do not
        exist, and for those that are shorter than one frame.
    """
    missing = missing_files(manifest)
    problems = {path: f"{os.path.join(manifest.root, path)}: does not exist; prepare again" for path in missing}
    for index in (manifest.samples < shortest).nonzero()[0].tolist():
        problem = too_short(manifest.path(index), manifest.samples[index], shortest)
        problems.setdefault(manifest.paths[index], problem)
    return problems


def too_short(path, samples, shortest):
    """A line that names the file and says that it has no whole frame; None if it has."""
    if samples >= shortest:
        return None
    return f"{path}: has {samples} samples at 16 kHz, but one frame takes {shortest}; remove it"


class BadAudio:
    """The recordings of one manifest that could not be used so far, each counted and logged once.

    Every process counts what it meets.

    Args:
        source: what lists them, such as the path of a manifest.
        total: how many recordings that are.
        policy: `skip` or `fail`.
        limit: the share of them that may be skipped.
        field: where users set the limit.
    """

    def __init__(self, source, total, policy, limit, field="task.bad_audio_limit"):
        self.source = source
        self.total = total
        self.allowed = int(limit * total + 1e-9) if policy == "skip" else 0  # 0.29 * 100 is a little less than 29
        self.policy = policy
        self.limit = limit
        self.field = field
        self.seen = set()

    def report(self, problems):
        """Log recordings as skipped.

        Args:
            problems: {path in the manifest: a line that names the file and says what is wrong}.

        Raises:
            InputError: too many cannot be used.
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
