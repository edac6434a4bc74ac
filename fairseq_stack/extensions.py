"""Loads a user's own losses, growth methods, schedules, listeners, teachers, export formats and probe tasks.

docs/extending.md shows how to write one.
"""

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from fairseq_stack.errors import InputError

GROUP = "fairseq_stack.extensions"  # group of the entry points in installed packages
_installed: list | None = None  # the modules of installed extensions; None before they are loaded


def load_extensions(names: Any, field: str = "task.extensions") -> None:
    """Import files and modules, which register what they define. Those that are loaded already are skipped.

    Args:
        names: a list of paths that end with .py and of modules' names. Other values are errors.
        field: the option or field that gave the names, for errors.

    Raises:
        InputError: `names` is no list of names, or one of them is missing or cannot be imported.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{field}={names} must be a list of files and modules, such as [my_losses.py]")
    for name in names:
        if name.endswith(".py"):
            _load_file(name, field)
        else:
            with _one_line(f"{field}={name}"):
                importlib.import_module(name)


def load_installed() -> None:
    """Import, once, the modules that installed packages name in their entry points of the group GROUP.

    Raises:
        InputError: one of them cannot be imported.
    """
    global _installed
    if _installed is not None:
        return
    _installed = found = []  # set before the imports, because an extension may look up names and so call this again
    try:
        for point in entry_points(group=GROUP):
            with _one_line(f"the installed extension {point.name} ({point.value})"):
                found.append(point.load())
    except InputError:
        _installed = None
        raise


def _load_file(path: str, field: str) -> None:
    if not os.path.isfile(path):
        raise InputError(
            f"{field}={path} is no file (in {os.getcwd()}); give the path of a Python file, or a module's name"
        )
    whole_path = os.path.realpath(path)
    # Not the file's own name, which an installed module might have too.
    name = f"fairseq_stack_extension_{hashlib.sha256(whole_path.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, whole_path)
    assert spec is not None and spec.loader is not None  # as for every path that ends with .py
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look up their module there
    try:
        with _one_line(f"{field}={path}", whole_path):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise


@contextmanager
def _one_line(what: str, path: str | None = None) -> Iterator[None]:
    """Turn any exception while `what` is imported into an InputError, which names the line in the file at `path`."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f" in line {lines[-1]}" if lines else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        kind = type(error).__name__
        raise InputError(f"{what} cannot be imported{where}: {kind}: {reason}; correct it") from None
