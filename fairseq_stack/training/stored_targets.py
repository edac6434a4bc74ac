"""Store a teacher's targets before a training, with the training's own configuration."""

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, cast

import torch
from fairseq import tasks
from omegaconf import DictConfig

import fairseq_stack
from fairseq_stack.errors import InputError
from fairseq_stack.extensions import use_extensions
from fairseq_stack.targets.fill import fill

if TYPE_CHECKING:
    from fairseq_stack.tasks.speech_distillation import SpeechDistillation


def store_targets(cfg: DictConfig, splits: Sequence[str], processes: int = 1) -> None:
    """Store the targets that a training with this configuration may ask for and that are not stored yet.

    Args:
        cfg: a composed recipe with task.target_store.
        splits: names of manifests.
        processes: the number of processes. Each uses one of the GPUs, in turn, or its share of the CPU.

    Raises:
        InputError: as the training would.
    """
    if not cfg.task.get("target_store"):
        raise InputError("task.target_store is not set; give the folder to fill")
    task = set_up(cfg, splits)  # before any process starts: it logs what is stored, or raises what is wrong
    if processes == 1:
        return fill(task, splits, cfg.dataset)
    threads = max(1, torch.get_num_threads() // processes)
    # A forked process could not use the GPU.
    spawning = get_context("spawn")
    with ProcessPoolExecutor(processes, spawning, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        shares = [pool.submit(_set_up_and_fill, cfg, splits, rank, processes) for rank in range(processes)]
        for share in as_completed(shares):
            share.result()


def set_up(cfg: DictConfig, splits: Sequence[str]) -> "SpeechDistillation":
    """Return the task of a training with its datasets, after all checks that a training makes before it starts.

    Raises:
        InputError: as the training would.
    """
    fairseq_stack.register()  # a spawned process has registered nothing
    use_extensions(cfg.task.extensions)
    task = cast("SpeechDistillation", tasks.setup_task(cfg.task))
    task.build_model(cfg.model)
    task.build_criterion(cfg.criterion)
    validated = cfg.dataset.valid_subset.split(",")
    combine = bool(cfg.dataset.combine_valid_subsets)
    if task.store is not None and task.store.without_codebooks:
        task.load_dataset(cfg.dataset.train_subset, combine)  # the speech that a training would learn them from
    for split in splits:
        if split not in validated:
            task.cfg.train_subset = split  # a training uses every window of it, also if it is one of several subsets
        if split not in task.datasets:
            task.load_dataset(split, combine)
    return task


def _set_up_and_fill(cfg: DictConfig, splits: Sequence[str], rank: int, processes: int) -> None:
    logging.disable(logging.INFO)  # the first set-up has logged it
    fill(set_up(cfg, splits), splits, cfg.dataset, rank, processes)
