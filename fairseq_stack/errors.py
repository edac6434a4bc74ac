"""Errors for users, each with a message of one line."""

import functools
import math
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Returned = TypeVar("Returned")


class InputError(ValueError):
    """Bad input: a file, a folder or a configuration field that cannot be used.

    The message is one line that names the file or field and its value and says what to do.
    """


class TrainingStopped(RuntimeError):
    """A training cannot continue. The message is one line that says where and why."""


class Preempted(TrainingStopped):
    """SIGTERM ended a training, which has saved a checkpoint and logged its last line."""


# The exit code that a shell reports for a program ended by SIGTERM: the job is not done and should start again.
PREEMPTED = 128 + signal.SIGTERM


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Raise an InputError unless the configuration field has one of the values `choices`.

    Such fields are of type str. With an Enum, fairseq and hydra answer a wrong name with a traceback.
    """
    if value not in choices:
        raise InputError(f"{field}={value} is unknown; choose from {', '.join(choices)}")


def check_numbers(field: str, values: Any) -> None:
    """Raise an InputError unless the configuration field is a list of whole numbers; fairseq does not check this."""
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise InputError(f"{field}={values} must be a list of whole numbers")


def check_weight(field: str, value: float) -> None:
    """Raise an InputError unless the configuration field is a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        raise InputError(f"{field}={value} must be 0 or more, and finite")


def check_positive(option: str, value: float) -> None:
    """Raise an InputError unless the value of a command's option is a finite number above 0."""
    if not 0 < value < math.inf:
        raise InputError(f"{option} {value} must be more than 0, and finite")


def check_output(option: str, path: str | os.PathLike, folder: bool = False) -> None:
    """Raise an InputError unless a command can write its output to a path.

    Commands call it before they start, so that no work is lost because its result cannot be saved.

    Args:
        option: the option that gave the path, for the error.
        path: of a file or a folder. It need not exist; the folders above it are checked too.
        folder: whether the output is a folder.
    """
    path = Path(path)
    if path.exists() and path.is_dir() is not folder:
        raise InputError(
            f"{option} {path} is a {'file' if folder else 'folder'}; give a {'folder' if folder else 'file'}"
        )
    parent = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not folder and parent == path:
        parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{option} {path}: {parent} is a file and no folder; choose another place")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{option} {path}: {parent} cannot be written; choose another place")


@contextmanager
def input_errors(what: str) -> Iterator[None]:
    """Turn any exception of a `with` block into an InputError that begins with `what` and ends with the reason.

    It guards code that uses the values of a file without checking them. A value of the wrong type fails
    where it is first used.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__} "
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{what}: {kind}{reason}".rstrip()) from None


def one_line_errors(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """Make a function end the program when it raises an InputError or TrainingStopped.

    The program prints the error's one line on stderr and exits with code 1. After a preempted training it exits
    with the code PREEMPTED. Only functions that start a program use this; library code raises.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        try:
            return function(*args, **kwargs)
        except Preempted:
            raise SystemExit(PREEMPTED) from None
        except (InputError, TrainingStopped) as error:
            raise SystemExit(f"error: {error}") from None

    return wrapped
