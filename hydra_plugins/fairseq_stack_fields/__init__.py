"""Makes `fairseq-hydra-train` import fairseq_stack before it reads the fields of a configuration.

fairseq merges the fields of optimizer and schedule with their defaults before it imports common.user_dir. A field that
does not exist then ends in a traceback. Hydra imports the modules of `hydra_plugins` in every program. This module
changes only fairseq's training command, and only if common.user_dir is this package.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from hydra.plugins.search_path_plugin import SearchPathPlugin


def _change_the_command() -> None:
    for name in ("fairseq_cli.hydra_train", "__main__"):  # __main__ with python -m
        module = sys.modules.get(name)
        # A launcher of jobs pickles hydra_main, which finds this function by its name when the job runs.
        if hasattr(module, "hydra_main") and hasattr(module, "add_defaults"):
            module.add_defaults = _user_dir_first(module.add_defaults)


def _user_dir_first(add_defaults: Callable) -> Callable:
    from fairseq.utils import import_user_module

    @functools.wraps(add_defaults)
    def checked(cfg: Any) -> None:
        user_dir = cfg.common.user_dir
        if os.path.basename(os.path.normpath(user_dir or "")) != "fairseq_stack":
            return add_defaults(cfg)
        try:
            import_user_module(cfg.common)
        except FileNotFoundError:
            raise SystemExit(
                f"error: common.user_dir={user_dir} does not exist in {os.getcwd()}; give the whole path of the folder"
            ) from None
        from fairseq_cli import train

        from fairseq_stack.errors import one_line_errors

        return one_line_errors(train.add_defaults)(cfg)  # the package has replaced it by now

    return checked


class FieldsPlugin(SearchPathPlugin):
    """Changes no path. A job that submitit requeues loads hydra's plugins as a pickle, which imports their modules."""

    def manipulate_search_path(self, search_path: Any) -> None:
        pass


_change_the_command()
