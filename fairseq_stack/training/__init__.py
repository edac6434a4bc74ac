"""Trains a student: trainer, optimizers, checks at the start, resuming, progress."""

import sys

# With python -m fairseq_cli.train, the functions that run are those of __main__ and not those of a second import.
_program = sys.modules["__main__"]
if hasattr(_program, "validate_and_save") and hasattr(_program, "should_stop_early"):
    import fairseq_cli

    sys.modules["fairseq_cli.train"] = _program
    fairseq_cli.__dict__["train"] = _program
