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

# What torch, CUDA and their libraries say where memory runs out.
SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc", "killed by signal: Killed",
)  # fmt: skip


class OutOfMemory(Exception):
    """A training needs more memory than there is."""


class Killed(OutOfMemory):
    """Its process is gone with it, as Linux ends one when memory runs out."""


class Worker:
    """A training in another process; its methods are called by name.

    Args:
        make: a function that makes the training; it is called in the other process.
        threads: how many threads the other process computes with.
        arguments: for `make`.

    Raises:
        OutOfMemory: there was not enough memory for what was asked. Unless the process was Killed, the training can
            be called again.
        InputError: what was asked cannot be done.
        RuntimeError: something else failed there; the message is its traceback.
    """

    def __init__(self, make, threads, *arguments):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads, arguments))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        try:
            self._receive()
        except Exception:
            self.close()
            raise

    def call(self, method, *arguments):
        try:
            self.connection.send((method, arguments))
        except OSError:
            raise Killed("its process was killed") from None
        return self._receive()

    def close(self):
        self.process.kill()
        self.process.join()

    def _receive(self):
        try:
            error, value = self.connection.recv()
        except (EOFError, OSError):
            raise Killed("its process was killed") from None
        if error is not None:
            raise error(value)
        return value


@contextmanager
def workers(threads, makers):
    """{name: Worker} of {name: (make, *arguments)}, and the names of those that do not fit; they end with the block."""
    running, without = {}, []
    try:
        for name, (make, *arguments) in makers.items():
            try:
                running[name] = Worker(make, threads, *arguments)
            except OutOfMemory:
                without.append(name)
        yield running, without
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
    logging.disable(logging.WARNING)  # fairseq has a page to say about memory
    torch.set_num_threads(threads)
    made = []
    function, given = (lambda: made.append(make(*arguments))), ()
    while True:
        answer = _attempt(function, given)
        if answer[0] is OutOfMemory and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        connection.send(answer)
        if not made:
            return
        method, given = connection.recv()
        function = peak_memory if method == "peak_memory" else getattr(made[0], method)


def _attempt(function, given):
    """(None, what a function returns), or the class and the message of an error."""
    try:
        return None, function(*given)
    except (InputError, SystemExit) as error:  # of a task, to which fairseq is the shell
        return InputError, str(error).removeprefix("error: ")
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS):
            return OutOfMemory, str(error)
        return RuntimeError, traceback.format_exc()


def peak_memory():
    """Bytes: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
