"""How processes that load data handle SIGTERM."""

import os
import signal
import threading


def obey_parent_alone() -> None:
    """Make a worker that loads data end on a SIGTERM from the training, and ignore any other SIGTERM.

    A cluster sends SIGTERM to every process of a job, but the training needs batches until its checkpoint.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
