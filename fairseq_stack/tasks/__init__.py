"""What fairseq registers as tasks."""

from fairseq_stack import fairseq_guards  # noqa: F401
from fairseq_stack.tasks import speech_distillation  # noqa: F401
