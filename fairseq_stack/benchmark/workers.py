"""Trainings in processes of their own, asked for one update at a time.

Each has its own memory, which can be measured, and its own libraries' settings; and since only one of them computes at
any time, they meet the same machine.
"""

import logging
import resource
import traceback
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from fairseq_stack.errors import InputError


class Worker:
    """A training in another process; its methods are called by name.

    Args:
        make: a function that makes the training; it is called in the other process.
        threads: how many threads the other process computes with.
        arguments: for `make`.

    Raises:
        RuntimeError: something failed there; the message is its traceback.
        InputError: the other process was killed.
    """

    def __init__(self, make, threads, *arguments):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads, arguments))
        self.process.start()
        self._receive()

    def call(self, method, *arguments):
        self.connection.send((method, arguments))
        return self._receive()

    def close(self):
        self.process.kill()
        self.process.join()

    def _receive(self):
        try:
            failed, value = self.connection.recv()
        except EOFError:
            raise InputError(
                "a training of the benchmark was killed, most likely because memory ran out: measure fewer at a time, as"
                " --precision fp32 does"
            ) from None
        if failed:
            raise RuntimeError(value)
        return value


@contextmanager
def workers(threads, makers):
    """{name: Worker} of {name: (make, *arguments)}; they end with the block."""
    running = {}
    try:
        for name, (make, *arguments) in makers.items():
            running[name] = Worker(make, threads, *arguments)
        yield running
    finally:
        for worker in running.values():
            worker.close()


def in_another_process(threads, function, *arguments):
    """Call a function in a process of its own and wait for it."""
    Worker(_call, threads, function, arguments).close()


class _call:
    def __init__(self, function, arguments):
        function(*arguments)


def _serve(connection, make, threads, arguments):
    logging.disable(logging.INFO)
    torch.set_num_threads(threads)
    try:
        training = make(*arguments)
        connection.send((False, None))
        while True:
            method, given = connection.recv()
            connection.send((False, peak_memory() if method == "peak_memory" else getattr(training, method)(*given)))
    except Exception:
        connection.send((True, traceback.format_exc()))


def peak_memory():
    """Bytes: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
