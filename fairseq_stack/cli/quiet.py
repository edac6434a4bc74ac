"""Silence for the libraries that a subcommand calls."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Hide warnings, announcements and progress bars of libraries, here and in child processes.

    They do not concern the user. Many appear when a library is imported, so call this first.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING)  # otherwise a module of fairseq sets INFO
    logging.getLogger("s3prl").setLevel(logging.ERROR)  # names the upstreams that it cannot import

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
