"""Warns at the start and the end of a run whose student does not reach full depth."""

import logging
from collections.abc import Iterator, Sequence
from itertools import count, islice
from math import ceil
from typing import Any

from fairseq.trainer import Trainer

from fairseq_stack.errors import InputError
from fairseq_stack.growth.schedule import Plateau
from fairseq_stack.models.stacked_hubert import StackedHubert

logger = logging.getLogger(__name__)


def check_depth(cfg: Any, model: StackedHubert, batches: int) -> None:
    """Warn about, or refuse, a run that cannot grow as its configuration says.

    Args:
        cfg: fairseq's configuration.
        model: a StackedHubert for training.
        batches: the number of batches of this process in an epoch.

    Raises:
        InputError: the run uses the plateau schedule, but has no validation before the last stage begins.
    """
    if model.stage_number == len(model.plan.stages):
        return
    assert model.starts is not None  # it is set for training
    last, epochs = model.starts[-1], cfg.optimization.max_epoch
    if model.plateau is not None:
        _check_validations(cfg, model.starts, model.plateau, list(validations(cfg, batches, last)))
    elif 0 < epochs and sum(islice(updates_of_epochs(cfg, batches), epochs)) <= last:
        logger.warning(
            f"optimization.max_epoch={epochs} ends the run before the last stage, which begins at update {last}; raise"
            " it, or lower optimization.max_update"
        )


def _check_validations(cfg: Any, starts: Sequence[int], plateau: Plateau, seen: list[int]) -> None:
    needed = plateau.patience + 1  # the first one of a stage is the reference for the others
    if not seen:
        dataset, first = cfg.dataset, starts[1]
        often = f"set dataset.validate_interval_updates={max((first - 1) // needed, 1)}"
        if dataset.disable_validation:
            given, remedy = "dataset.disable_validation=true", "set it to false"
        elif dataset.validate_after_updates >= starts[-1]:
            given, remedy = f"dataset.validate_after_updates={dataset.validate_after_updates}", "lower it"
        else:
            given, remedy = f"dataset.validate_interval={dataset.validate_interval}", often
        raise InputError(
            f"model.stack_schedule=plateau needs validations, and with {given} there is none before the last stage"
            f" begins, at update {starts[-1]}; {remedy}, or choose model.stack_schedule=prop"
        )
    ends = list(enumerate(zip(starts, starts[1:]), start=1))
    patience, least = plateau.patience, plateau.min_updates
    short = [
        str(stage)
        for stage, (begin, end) in ends
        if end - begin > least and sum(begin < update < end for update in seen) < needed
    ]
    if short:
        logger.warning(
            f"model.stack_schedule=plateau: stage {', '.join(short)} of {len(ends) + 1} has fewer than the {needed}"
            f" validations that model.stack_patience={patience} needs, and ends as with"
            " model.stack_schedule=prop; validate more often, or lower the patience"
        )
    short = [str(stage) for stage, (begin, end) in ends if end - begin <= least]
    if short:
        logger.warning(
            f"model.stack_schedule=plateau: stage {', '.join(short)} of {len(ends) + 1} has no more updates than"
            f" model.stack_min_updates={least}, and ends as with model.stack_schedule=prop; lower it"
        )
    stop = cfg.checkpoint
    if 0 < stop.patience <= patience and stop.best_checkpoint_metric == "loss":
        logger.warning(
            f"checkpoint.patience={stop.patience} ends the run where model.stack_patience={patience} would let it grow;"
            f" set checkpoint.patience={patience + 1} or more"
        )


def updates_of_epochs(cfg: Any, batches: int) -> Iterator[int]:
    """Yield the number of updates in epochs 1, 2, ..., without end."""
    frequencies = cfg.optimization.update_freq
    for epoch in count():
        updates = batches / frequencies[min(epoch, len(frequencies) - 1)]
        yield int(updates) if cfg.optimization.skip_remainder_batch else ceil(updates)


def validations(cfg: Any, batches: int, before: int) -> Iterator[int]:
    """Yield the updates below `before` after which fairseq validates, as validate_and_save in fairseq_cli/train.py."""
    dataset, save = cfg.dataset, cfg.checkpoint.save_interval_updates
    every, first = dataset.validate_interval_updates, dataset.validate_after_updates
    update = 0
    for epoch, updates in enumerate(updates_of_epochs(cfg, batches), start=1):
        if dataset.disable_validation or not updates or 0 < cfg.optimization.max_epoch < epoch:
            return
        for left in reversed(range(updates)):
            update += 1
            if update >= before:
                return
            due = not left and 0 < dataset.validate_interval and epoch % dataset.validate_interval == 0
            due = due or (left and 0 < save and update % save == 0) or (0 < every and update % every == 0)
            if due and update >= first:
                yield update


def depth_at_end(cfg: Any, trainer: Trainer, next_epoch: int) -> str | None:
    """Return one line for the user if a run ends before full depth, else None.

    Args:
        cfg: fairseq's configuration.
        trainer: the run's trainer.
        next_epoch: the number of the epoch that would come next, from 1.
    """
    model, updates, run = trainer.get_model(), trainer.get_num_updates(), cfg.optimization
    stage, stages = model.stage_number, len(model.plan.stages)
    if stage == stages:
        return None
    if 0 < run.max_update <= updates:
        field, change = f"optimization.max_update={run.max_update}", "raise"
    elif 0 < run.stop_time_hours < trainer.cumulative_training_time() / 3600:
        field, change = f"optimization.stop_time_hours={run.stop_time_hours}", "raise"
    elif 0 < run.max_epoch < next_epoch:
        field, change = f"optimization.max_epoch={run.max_epoch}", "raise"
    elif trainer.get_lr() <= run.stop_min_lr:
        field, change = f"optimization.stop_min_lr={run.stop_min_lr}", "lower"
    else:
        field, change = f"checkpoint.patience={cfg.checkpoint.patience}", "raise"
    latest = " at the latest" if model.plateau is not None else ""
    begins = f", which begins at update {model.starts[stage]}{latest}" if model.starts[stage] > updates else ""
    return (
        f"the run ends at update {updates} in stage {stage} of {stages}, before full depth: the student has"
        f" {model.depth} of {model.plan.depths[-1]} layers. It ended by {field}; {change} it and start the same command"
        f" again to reach the next stage{begins}"
    )
