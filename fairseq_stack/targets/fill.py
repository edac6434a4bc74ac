"""Fill a store with the teacher's targets before a training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from fairseq import utils
from fairseq.data import data_utils
from torch.utils.data import DataLoader
from tqdm import tqdm

from fairseq_stack.targets.source import stored_targets

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fairseq_stack.data.dataset import SpeechDataset
    from fairseq_stack.tasks.speech_distillation import SpeechDistillation


def fill(
    task: "SpeechDistillation", splits: Sequence[str], loading: "DictConfig", rank: int = 0, processes: int = 1
) -> None:
    """Store the targets that are missing, or the share of them that one of several processes computes.

    Args:
        task: a SpeechDistillation with a store and its datasets.
        splits: names of its datasets.
        loading: a recipe's `dataset`, with num_workers and batch_size or max_tokens.
        rank, processes: which share, and of how many.

    Raises:
        InputError: too many recordings cannot be used, or the store cannot be written.
    """
    assert task.store is not None
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)  # kernels of libraries run on the current device
    names = task.store.names()
    for split in splits:
        dataset: SpeechDataset = task.dataset(split)
        counts = dataset.window_counts.tolist()
        windows = [(index, number) for index, count in enumerate(counts) for number in range(count)]
        # Shares are cut before stored windows are left out, because other processes are storing windows meanwhile.
        windows = [window for window in windows[rank::processes] if dataset.entry(*window).name not in names]
        windows.sort(key=lambda window: dataset.sizes[window[0]])
        sizes = dataset.sizes[[index for index, _ in windows]]
        batches = data_utils.batch_by_size(
            np.arange(len(windows)), sizes.__getitem__, sizes, loading.max_tokens, loading.batch_size
        )
        batches = DataLoader(
            _Windows(dataset),
            batch_sampler=[[windows[position] for position in batch] for batch in batches],  # pyright: ignore[reportArgumentType] torch expects ints, but any index will do
            collate_fn=dataset.collater,
            num_workers=loading.num_workers,
            pin_memory=device is not None,
            # Workers of a spawned process would be spawned too, and would import everything again.
            multiprocessing_context="fork" if loading.num_workers else None,
        )
        bar = tqdm(total=len(windows), desc=split, unit=" windows", mininterval=1, disable=rank > 0 or not windows)
        with bar, task.store.writing_beside():
            for batch in batches:
                task.bad_audio[split].report(batch["problems"])
                batch = batch if device is None else cast(dict, utils.move_to_cuda(batch, device))
                stored_targets(batch, task.teacher, task.store)
                bar.update(len(batch["utterances"]))


class _Windows(torch.utils.data.Dataset):
    """A SpeechDataset whose samples are chosen by pairs (index, number of the window)."""

    def __init__(self, dataset: "SpeechDataset") -> None:
        self.dataset = dataset

    def __getitem__(self, window: tuple[int, int]) -> dict:
        return self.dataset.load_window(*window)
