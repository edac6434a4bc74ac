"""Trainings in processes of their own, asked for one update at a time.

Each has its own memory, which can be measured, and its own libraries' settings. Only one of them computes at any time,
so all meet the same machine.
"""

import logging
import resource
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from fairseq_stack.errors import InputError

# What torch, CUDA and their libraries say where memory runs out.
SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc",
    "killed by signal: Killed",
)  # fmt: skip


class OutOfMemory(Exception):
    """A training needs more memory than there is."""


class Killed(OutOfMemory):
    """Its process is gone with it, as Linux ends one when memory runs out."""


class Worker:
    """A process that calls functions, one after another.

    Args:
        threads: how many threads it computes with.
    """

    def __init__(self, threads):
        # A pool gives its calls to any of its processes. A pool of one keeps what a call has made.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _set_up, (threads,))

    def run(self, function, *arguments):
        """What a function returns in the other process.

        Raises:
            OutOfMemory: there was not enough memory. Unless the process was Killed, it can be asked again.
            InputError: what was asked cannot be done.
            RuntimeError: something else failed there; the message is its traceback.
        """
        try:
            return self._pool.submit(_run, function, arguments).result()
        except BrokenProcessPool:
            raise Killed("its process was killed") from None

    def call(self, method, *arguments):
        """What a method of the process's training returns; raises as `run` does."""
        return self.run(_call, method, *arguments)

    def close(self):
        """End the process."""
        self._pool.shutdown()


@contextmanager
def workers(threads, makers):
    """{name: Worker with a training} of {name: (make, *arguments)}, and the names of trainings that do not fit.

    `make` makes the training in the worker's process. The processes end with the block.
    """
    running, without = {}, []
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


def in_another_process(threads, function, *arguments):
    """Call a function in a process of its own and wait for it; raises as `Worker.run` does."""
    worker = Worker(threads)
    try:
        worker.run(function, *arguments)
    finally:
        worker.close()


def peak_memory():
    """Bytes: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_training = None  # of this process


def _set_up(threads):
    logging.disable(logging.WARNING)  # fairseq has a page to say about memory
    torch.set_num_threads(threads)


def _make(make, *arguments):
    global _training
    _training = make(*arguments)


def _call(method, *arguments):
    return getattr(_training, method)(*arguments)


def _run(function, arguments):
    """Call a function; its errors become those of `Worker.run`."""
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)):
            raise RuntimeError(traceback.format_exc()) from None
        message = str(error)
    # Out here nothing holds the call's tensors any more.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise OutOfMemory(message)
