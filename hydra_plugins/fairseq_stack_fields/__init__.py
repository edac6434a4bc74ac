"""Lets `fairseq-hydra-train` import fairseq_stack before it looks at the fields of a configuration.

fairseq merges the fields of optimizer and schedule with their defaults before it imports common.user_dir, and a field
that does not exist ends in a traceback. Hydra imports the modules of `hydra_plugins` in every program. Here that
changes nothing but fairseq's training command, and nothing in that for another user_dir.
"""

import os
import sys


def _look_for_the_command():
    for name in ("fairseq_cli.hydra_train", "__main__"):  # the latter with python -m
        module = sys.modules.get(name)
        if hasattr(module, "hydra_main") and hasattr(module, "add_defaults"):
            module.add_defaults = _user_dir_first(module.add_defaults)


def _user_dir_first(add_defaults):
    from fairseq.utils import import_user_module
    from fairseq_cli import train

    def checked(cfg):
        user_dir = cfg.common.user_dir
        if os.path.basename(os.path.normpath(user_dir or "")) != "fairseq_stack":
            return add_defaults(cfg)
        try:
            import_user_module(cfg.common)
        except FileNotFoundError:
            raise SystemExit(
                f"error: common.user_dir={user_dir} does not exist in {os.getcwd()}; give the whole path of the folder"
            ) from None
        train.add_defaults(cfg)  # which the package has replaced by then

    return checked


_look_for_the_command()
