"""Distillation of speech foundation models with interleaved stacking, as a fairseq extension.

Importing the package, or any part of it, registers nothing and changes nothing in fairseq. The command line registers its
task, model and criterion with `--user-dir` or `common.user_dir`, a program with `fairseq_stack.register()`. Growth, losses,
export and analysis need neither fairseq nor hydra.
"""

__version__ = "0.2.0"


def register():
    """Register the task, the model and the criterion with fairseq, as `--user-dir fairseq_stack` does.

    Call it in a notebook or a program before it composes a configuration. Calling it again changes nothing.
    """
    from fairseq_stack.tasks import registration  # noqa: F401


class _SearchPath(list):
    """The package's `__path__`.

    fairseq registers a user_dir by importing its tasks and models, but not where the package has been imported before. Then
    it looks here whether that was the same folder, and asks nothing else. So the answer registers.
    """

    def __contains__(self, folder):
        found = super().__contains__(folder)
        if found:
            register()
        return found


__path__ = _SearchPath(__path__)
