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
from typing import TYPE_CHECKING, Any, NamedTuple

from fairseq_stack.errors import InputError

if TYPE_CHECKING:
    from fairseq_stack.registry import Registry

GROUP = "fairseq_stack.extensions"  # group of the entry points in installed packages
_installed: list | None = None  # the modules of installed extensions; None before they are loaded


class _Registration(NamedTuple):
    """What an extension has registered, whether it is in use or not.

    Attributes:
        owners: modules of the extensions that brought it, and the module that defines it.
        registry, name, found: what Registry.add and Registry.discard take.
    """

    owners: set[str]
    registry: "Registry"
    name: str
    found: tuple[Any, Any]

    def belongs_to(self, module: str) -> bool:
        return any(f"{owner}.".startswith(f"{module}.") for owner in self.owners)


_registrations: list[_Registration] = []
_importing: list[str] = []  # modules of the extensions whose import has begun; the innermost is the last
_of_program: list[str] = []  # modules of the extensions that stay in use


def load_extensions(names: Any, field: str = "task.extensions") -> None:
    """Import files and modules, and use what they register until the process ends.

    Args:
        names: a list of paths that end with .py and of modules' names. Other values are errors.
        field: the option or field that gave the names, for errors.

    Raises:
        InputError: `names` is no list of names, or one of them is missing or cannot be imported.
    """
    for module in _imported(names, field):
        _activate(module)
        if not _importing:  # otherwise it is a part of the extension that loads it
            _of_program.append(module)


def use_extensions(names: Any) -> None:
    """Import files and modules, and use what they register until the next call, beside that of `load_extensions`.

    So a training has the extensions that it names, and not those of another training in the same process. A module is
    executed once, and its registrations come and go.

    Args:
        names: the field task.extensions; None is an empty list.

    Raises:
        InputError: as load_extensions.
    """
    for registration in _registrations:
        registration.registry.discard(registration.name, registration.found)
    for module in _of_program:
        _activate(module)
    for module in _imported([] if names is None else names, "task.extensions"):
        _activate(module)


def note_registration(registry: "Registry", name: str, found: tuple[Any, Any]) -> None:
    """Remember what an extension registers while it is imported. The package's own modules are no extensions."""
    module = found[0].__module__
    if _importing and not module.startswith("fairseq_stack."):
        _registrations.append(_Registration({*_importing, module}, registry, name, found))


def _activate(module: str) -> None:
    for registration in _registrations:
        if registration.belongs_to(module):
            registration.registry.add(registration.name, registration.found)
            registration.owners.update(_importing)


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


def _imported(names: Any, field: str) -> Iterator[str]:
    """Import extensions one after another, each once in this process, and yield the names of their modules."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{field}={names} must be a list of files and modules, such as [my_losses.py]")
    if names:
        load_installed()  # before, because an installed extension belongs to no training
    for name in names:
        path = _file(name, field) if name.endswith(".py") else None
        # Not the file's own name, which an installed module might have too.
        module = f"fairseq_stack_extension_{hashlib.sha256(path.encode()).hexdigest()[:16]}" if path else name
        if module not in sys.modules:
            _importing.append(module)
            try:
                with _one_line(f"{field}={name}", path):
                    if path:
                        _execute(path, module)
                    else:
                        importlib.import_module(module)
            except InputError:
                _forget(module)
                raise
            finally:
                _importing.remove(module)
        yield module


def _file(path: str, field: str) -> str:
    if not os.path.isfile(path):
        raise InputError(
            f"{field}={path} is no file (in {os.getcwd()}); give the path of a Python file, or a module's name"
        )
    return os.path.realpath(path)


def _execute(path: str, name: str) -> None:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as for every path that ends with .py
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _forget(module: str) -> None:
    """Forget what a module that failed has registered: it will be executed again."""
    for registration in _registrations:
        if registration.found[0].__module__ == module:
            registration.registry.discard(registration.name, registration.found)
    _registrations[:] = [each for each in _registrations if each.found[0].__module__ != module]


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
