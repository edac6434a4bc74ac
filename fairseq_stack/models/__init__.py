"""What fairseq registers as models."""

from fairseq_stack.models import hubert_ctc, stacked_hubert  # noqa: F401
