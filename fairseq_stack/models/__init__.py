"""What fairseq registers as models."""

from fairseq_stack.models import stacked_hubert  # noqa: F401
