"""Loads a user's own losses, growth methods, schedules, listeners, teachers, export formats and probe tasks.

docs/extending.md shows how to write one.
"""

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location

from fairseq_stack.errors import InputError

GROUP = "fairseq_stack.extensions"  # of entry points in installed packages
_installed = None  # their modules; None before they are loaded


def load_extensions(names, field="task.extensions"):
    """Import files and modules, which register what they define. One that is loaded already is left alone.

    Args:
        names: a list of paths that end with .py, and of names of modules.
        field: what gave them, for errors.

    Raises:
        InputError: no list of names, or one of them is not there or cannot be imported.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{field}={names} must be a list of files and modules, such as [my_losses.py]")
    for name in names:
        if name.endswith(".py"):
            _load_file(name, field)
        else:
            with _one_line(f"{field}={name}"):
                importlib.import_module(name)


def load_installed():
    """Import the modules that installed packages name in their entry points of the group GROUP, once.

    Raises:
        InputError: one of them cannot be imported.
    """
    global _installed
    if _installed is not None:
        return
    _installed = []  # they may ask for names themselves
    try:
        for point in entry_points(group=GROUP):
            with _one_line(f"the installed extension {point.name} ({point.value})"):
                _installed.append(point.load())
    except InputError:
        _installed = None
        raise


def _load_file(path, field):
    if not os.path.isfile(path):
        raise InputError(
            f"{field}={path} is no file (in {os.getcwd()}); give the path of a Python file, or a module's name"
        )
    whole_path = os.path.realpath(path)
    # Another name than the file's, which could be that of a module.
    name = f"fairseq_stack_extension_{hashlib.sha256(whole_path.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, whole_path)
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    try:
        with _one_line(f"{field}={path}", whole_path):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise


@contextmanager
def _one_line(what, path=None):
    """Turn what fails while `what` is imported into an InputError, which tells the line of a file at `path`."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f" in line {lines[-1]}" if lines else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        kind = type(error).__name__
        raise InputError(f"{what} cannot be imported{place}: {kind}: {reason}; correct it") from None
