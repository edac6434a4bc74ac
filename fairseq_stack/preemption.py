"""SIGTERM: how a cluster asks a job to end, some seconds before it kills it.

A training that is told to end finishes its update, saves a checkpoint and exits with EXIT_CODE.
"""

import os
import signal
import threading

# What a shell reports of a program that SIGTERM has ended: the job is not done, start it again.
EXIT_CODE = 128 + signal.SIGTERM

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
    """End the program as a SIGTERM does."""
    _told.clear()
    raise SystemExit(EXIT_CODE)


def obey_parent_alone():
    """In a worker that loads data: die of a SIGTERM from the training, and of no one else's.

    A cluster sends it to every process of a job, and the training needs its batches up to the
    checkpoint.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent():
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
