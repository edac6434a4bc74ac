"""Foundation models to learn from, behind one small interface (`base.Teacher`)."""

from fairseq_stack.teachers.fairseq_checkpoint import load_fairseq_teacher as load_teacher

__all__ = ["load_teacher"]
