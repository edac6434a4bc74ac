"""SIGTERM: how a cluster asks a job to end, some seconds before it kills it.

A training that is told to end finishes its update and saves a checkpoint.
"""

import signal
import threading

from fairseq_stack.errors import Preempted

_told = threading.Event()


def listen():
    """Remember a SIGTERM instead of dying of it. Only a process's main thread can.

    One that came at the end of the training before, in a sweep, is for this one.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda signum, frame: _told.set())


def told_to_end():
    """Whether a SIGTERM has come that has not been obeyed yet."""
    return _told.is_set()


def obey():
    """End the training, and with it the program as a SIGTERM does.

    Raises:
        Preempted: always.
    """
    _told.clear()
    raise Preempted
