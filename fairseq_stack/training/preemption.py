"""Handles SIGTERM, with which a cluster asks a job to end some seconds before it kills it.

The training then finishes its update and saves a checkpoint. In a job of submitit this holds for the signal before the
time limit, too. Submitit's own handler requeues the job in the middle of an update.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from fairseq_stack.errors import Preempted

_requested = threading.Event()
_received: signal.Signals = signal.SIGTERM  # the signal that has come first
_requeue: dict[int, Callable] = {}  # submitit's handler of its signal


def listen() -> None:
    """Remember a SIGTERM instead of ending the process. This works only in the main thread of a process.

    In a sweep, a SIGTERM that came at the end of one training ends the next one.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _remember)
        number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
        handler = signal.getsignal(number)
        if "SUBMITIT_EXECUTOR" in os.environ and callable(handler) and handler is not _remember:
            _requeue[number] = handler
            signal.signal(number, _remember)


def unlisten() -> None:
    """Let a SIGTERM end the process again, if `listen` has been called."""
    if signal.getsignal(signal.SIGTERM) is _remember:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in list(_requeue):
        signal.signal(number, _requeue.pop(number))


def _remember(signum: int, frame: object) -> None:
    global _received
    if not _requested.is_set():
        _received = signal.Signals(signum)
    _requested.set()


def requested() -> bool:
    """Return whether a SIGTERM has come that has not ended a training yet."""
    return _requested.is_set()


def received() -> str:
    """Return the name of the signal that has come."""
    return _received.name


def stop() -> NoReturn:
    """End the training and the program. The exit code is that of a program that SIGTERM ends.

    Raises:
        Preempted: always.
    """
    _requested.clear()
    if _received in _requeue:
        _requeue[_received](_received, None)  # the first process requeues the job and ends
        _requested.wait(60)  # the others wait for the SIGTERM that follows; a job ends with its first process that ends
    raise Preempted
