"""What fairseq registers as criterions."""

from fairseq_stack.criterions import layer_distillation  # noqa: F401
