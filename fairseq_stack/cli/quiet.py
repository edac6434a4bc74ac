"""Silence for the libraries that a subcommand calls."""

import warnings


def quiet_libraries():
    """Hide warnings and progress bars of loading models: they are not about the user's model."""
    from transformers.utils.logging import disable_progress_bar

    warnings.filterwarnings("ignore")
    disable_progress_bar()
