"""Trainings in their own processes, which make one update at a time.

The memory of each can be measured, and each has its own settings of the libraries. Only one process computes at a time,
so that they do not slow down each other.
"""

import logging
import resource
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from fairseq_stack.errors import InputError

# Parts of the error messages of torch, CUDA and their libraries when memory runs out.
SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc",
    "killed by signal: Killed",
)  # fmt: skip


# (make, *arguments): `make(*arguments)` returns a training.
Maker = tuple[Any, ...]


class OutOfMemory(Exception):
    """A training needs more memory than the machine has."""


class Killed(OutOfMemory):
    """The training's process was killed, as Linux does when memory runs out."""


class Worker:
    """A process that calls functions, one after another.

    Args:
        threads: how many threads it computes with.
    """

    def __init__(self, threads: int):
        # A pool with one process: every call finds the training that an earlier call made.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _set_up, (threads,))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in the other process and returns its result.

        Raises:
            OutOfMemory: there was not enough memory. Unless it is Killed, the process can be used again.
            InputError: as the function.
            RuntimeError: the function raised another error; the message is its traceback.
        """
        try:
            return self._pool.submit(_run, function, arguments).result()
        except BrokenProcessPool:
            raise Killed("its process was killed") from None

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the process's training and returns its result. Raises the errors of `run`."""
        return self.run(_call, method, *arguments)

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


@contextmanager
def workers(threads: int, makers: Mapping[str, Maker]) -> Iterator[tuple[dict[str, Worker], list[str]]]:
    """Starts a process for each training, which end with the `with` block.

    Args:
        threads: of each training.
        makers: by the trainings' names; each is called in its training's process.

    Yields:
        {name: Worker with a training}, and the names of the trainings that do not fit into memory.
    """
    running: dict[str, Worker] = {}
    without: list[str] = []
    try:
        for name, maker in makers.items():
            worker = running[name] = Worker(threads)
            try:
                worker.run(_make, *maker)
            except OutOfMemory:
                without.append(name)
                running.pop(name).close()
        yield running, without
    finally:
        for worker in running.values():
            worker.close()


def in_another_process(threads: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function in its own process and waits for it. Raises the errors of `Worker.run`."""
    worker = Worker(threads)
    try:
        worker.run(function, *arguments)
    finally:
        worker.close()


def peak_memory() -> int:
    """Returns the peak memory in bytes: of the GPU if the process uses one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_training = None  # of this process


def _set_up(threads):
    logging.disable(logging.WARNING)  # fairseq logs a page about memory
    torch.set_num_threads(threads)


def _make(make, *arguments):
    global _training
    _training = make(*arguments)


def _call(method, *arguments):
    return getattr(_training, method)(*arguments)


def _run(function, arguments):
    """Calls a function and converts its errors to those of `Worker.run`."""
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)):
            raise RuntimeError(traceback.format_exc()) from None
        message = str(error)
    # Outside of the handler, nothing refers to the call's tensors any more.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise OutOfMemory(message)
