"""Resets the state that fairseq keeps in the process, so that one training does not affect the next.

A hydra sweep (`fairseq-hydra-train -m`) runs its trainings one after another in one process.
"""

import logging

from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq_cli import train as fairseq_train


def reset_process_state() -> None:
    """Reset what earlier trainings in this process left: the best loss, the patience and their logs.

    fairseq itself resets its metrics and seeds the random generators.
    """
    for function, names in (
        (checkpoint_utils.save_checkpoint, ("best",)),
        (fairseq_train.should_stop_early, ("best", "num_runs")),
    ):
        for name in names:
            vars(function).pop(name, None)
    progress_bar._close_writers()
    progress_bar._tensorboard_writers.clear()
    for logger in (fairseq_train.logger, progress_bar.logger):  # the files of common.log_file
        for handler in [each for each in logger.handlers if isinstance(each, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()
    if progress_bar.wandb is not None and progress_bar.wandb.run is not None:
        progress_bar.wandb.finish()
    aim_run = getattr(progress_bar, "get_aim_run", None)  # fairseq 0.12.2 does not log to Aim
    if aim_run is not None:
        aim_run.cache_clear()
