"""Handles SIGTERM, with which a cluster asks a job to end some seconds before it kills it.

The training then finishes its update and saves a checkpoint.
"""

import signal
import threading
from typing import NoReturn

from fairseq_stack.errors import Preempted

_requested = threading.Event()


def listen() -> None:
    """Remember a SIGTERM instead of ending the process. This works only in the main thread of a process.

    In a sweep, a SIGTERM that came at the end of one training ends the next one.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _remember)


def unlisten() -> None:
    """Let a SIGTERM end the process again, if `listen` has been called."""
    if signal.getsignal(signal.SIGTERM) is _remember:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _remember(signum: int, frame: object) -> None:
    _requested.set()


def requested() -> bool:
    """Return whether a SIGTERM has come that has not ended a training yet."""
    return _requested.is_set()


def stop() -> NoReturn:
    """End the training and the program. The exit code is that of a program that SIGTERM ends.

    Raises:
        Preempted: always.
    """
    _requested.clear()
    raise Preempted
