"""What to do about recordings that cannot be used: skip a few of them, or stop at the first."""

import logging

from fairseq_stack.errors import InputError, check_choice

logger = logging.getLogger(__name__)

POLICIES = ("skip", "fail")


def check_bad_audio(policy, limit):
    """Check task.bad_audio and task.bad_audio_limit.

    Raises:
        InputError: the policy is unknown, or the limit is no share.
    """
    check_choice("task.bad_audio", policy, POLICIES)
    if not 0 <= limit < 1:
        raise InputError(f"task.bad_audio_limit={limit} must be a share of the manifest, 0 or more and below 1")


class BadAudio:
    """The recordings of one manifest that could not be used so far, each counted and logged once.

    Every process counts what it meets.

    Args:
        manifest: path of the manifest.
        total: how many recordings it lists.
        policy: `skip` or `fail`.
        limit: the share of them that may be skipped.
    """

    def __init__(self, manifest, total, policy, limit):
        self.manifest = manifest
        self.total = total
        self.allowed = int(limit * total) if policy == "skip" else 0
        self.policy = policy
        self.limit = limit
        self.seen = set()

    def report(self, problems):
        """Log recordings as skipped.

        Args:
            problems: {path in the manifest: a line that names the file and says what is wrong}.

        Raises:
            InputError: one too many cannot be used.
        """
        for path, line in problems.items():
            if path in self.seen:
                continue
            self.seen.add(path)
            if len(self.seen) > self.allowed:
                reason = f"{len(self.seen)} of {self.total} recordings in {self.manifest} cannot be used"
                if self.policy == "skip":
                    reason += f", more than task.bad_audio_limit={self.limit} of them"
                raise InputError(f"{line} ({reason})")
            logger.warning(f"bad audio | skipped {line}")
