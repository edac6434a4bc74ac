"""Fill a store of targets ahead of the training, with a training's own configuration."""

import logging
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import numpy as np
import torch
from fairseq import utils
from fairseq.data import data_utils
from torch.utils.data import DataLoader
from tqdm import tqdm

import fairseq_stack
from fairseq_stack.errors import InputError
from fairseq_stack.extensions import load_extensions
from fairseq_stack.targets.source import stored_targets
from fairseq_stack.tasks.speech_distillation import SpeechDistillation


def store_targets(cfg, splits, processes=1):
    """Store what a training with this configuration may ask for, as far as it is not there yet.

    Args:
        cfg: a composed recipe with task.target_store.
        splits: names of manifests.
        processes: how many to work in; each takes one of the GPUs, in turn, or its share of the CPU.

    Raises:
        InputError: as the training would.
    """
    if not cfg.task.get("target_store"):
        raise InputError("task.target_store is not set; give the folder to fill")
    task = set_up(cfg, splits)  # before any process starts: it says what is there, or what is wrong
    if processes == 1:
        return fill(task, splits, cfg.dataset, 0, 1)
    threads = max(1, torch.get_num_threads() // processes)
    # A fork could not use the GPU.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, [threads]) as pool:
        shares = [pool.submit(_set_up_and_fill, cfg, splits, rank, processes) for rank in range(processes)]
        for share in as_completed(shares):
            share.result()


def set_up(cfg, splits):
    """The task of a training with its datasets, after all that a training checks has been checked.

    Raises:
        InputError: as the training would.
    """
    fairseq_stack.register()  # in a process of its own, too
    load_extensions(cfg.task.extensions)  # in each process
    task = SpeechDistillation.setup_task(cfg.task)
    task.build_model(cfg.model)
    task.build_criterion(cfg.criterion)
    validated = cfg.dataset.valid_subset.split(",")
    for split in splits:
        if split not in validated:
            task.cfg.train_subset = split  # one of several training subsets, too, is heard in all its windows
        task.load_dataset(split, combine=bool(cfg.dataset.combine_valid_subsets))
    return task


def fill(task, splits, loading, rank, processes):
    """Store the share of one process.

    Args:
        task: a SpeechDistillation, from `set_up`.
        splits: names of its datasets.
        loading: has num_workers and batch_size or max_tokens, as in a recipe's `dataset`.
        rank, processes: which share, and of how many.
    """
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)  # for what goes to the current one, as kernels of libraries do
    names = task.store.names()
    for split in splits:
        dataset = task.dataset(split)
        counts = dataset.window_counts.tolist()
        windows = [(index, number) for index, count in enumerate(counts) for number in range(count)]
        # The shares do not depend on what is there, which other processes are changing.
        windows = [window for window in windows[rank::processes] if dataset.entry(*window).name not in names]
        windows.sort(key=lambda window: dataset.sizes[window[0]])
        sizes = dataset.sizes[[index for index, _ in windows]]
        batches = data_utils.batch_by_size(
            np.arange(len(windows)), sizes.__getitem__, sizes, loading.max_tokens, loading.batch_size
        )
        batches = DataLoader(
            _Windows(dataset),
            batch_sampler=[[windows[position] for position in batch] for batch in batches],
            collate_fn=dataset.collater,
            num_workers=loading.num_workers,
            pin_memory=device is not None,
            # In a spawned process workers would be spawned too, and import everything anew.
            multiprocessing_context="fork" if loading.num_workers else None,
        )
        bar = tqdm(total=len(windows), desc=split, unit=" windows", mininterval=1, disable=rank > 0)
        with bar, task.store.writing_beside():
            for batch in batches:
                task.bad_audio[split].report(batch["problems"])
                batch = batch if device is None else utils.move_to_cuda(batch, device)
                stored_targets(batch, task.teacher, task.store)
                bar.update(len(batch["utterances"]))


class _Windows(torch.utils.data.Dataset):
    """A SpeechDataset by pairs of index and number of the window."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, window):
        return self.dataset.load_window(*window)


def _set_up_and_fill(cfg, splits, rank, processes):
    logging.disable(logging.INFO)  # said already
    fill(set_up(cfg, splits), splits, cfg.dataset, rank, processes)
