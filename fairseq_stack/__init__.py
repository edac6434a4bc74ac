"""Distillation of speech foundation models with interleaved stacking, as a fairseq extension.

Importing the package, or any part of it, registers nothing and changes nothing in fairseq. On the command line,
`--user-dir` or `common.user_dir` registers the package's task, model and criterion. A program calls
`fairseq_stack.register()`. Growth, losses, export and analysis need neither fairseq nor hydra.
"""

import os

__version__ = "0.2.0"


def register() -> None:
    """Register the task, the model and the criterion with fairseq, as `--user-dir fairseq_stack` does.

    Call it in a notebook or a program before it composes a configuration. Calling it again changes nothing.
    """
    from fairseq_stack.tasks import registration  # noqa: F401


class _SearchPath(list):
    """The package's `__path__`.

    fairseq registers a user_dir by importing its tasks and models. If the package is imported already, fairseq only
    checks whether its `__path__` contains that folder. So this check registers them.
    """

    def __contains__(self, folder: object) -> bool:
        found = isinstance(folder, str) and os.path.realpath(folder) in map(os.path.realpath, self)
        if found:
            register()
        return found


__path__ = _SearchPath(__path__)
