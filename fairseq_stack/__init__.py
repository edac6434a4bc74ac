"""Distillation of speech foundation models with interleaved stacking, as a fairseq extension.

fairseq imports this package as its `user_dir`; then, and only then, the task, the model and the
criterion are registered. Everyone else gets the parts they import: growth, losses, export and
analysis need neither fairseq nor hydra.
"""

import sys

if sys.modules.get("fairseq"):
    from fairseq_stack import criterions, models, tasks  # noqa: F401
