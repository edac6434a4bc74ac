"""What users get wrong, said in one line."""

import functools
import math
import os
import signal
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: a file, a folder or a configuration field that cannot be used.

    The message is one line that names the file or field and its value and says what to do.
    """


class TrainingStopped(RuntimeError):
    """A training that cannot go on. The message is one line that says where and why."""


class Preempted(TrainingStopped):
    """A training that SIGTERM has ended after it saved a checkpoint. It has logged its line already."""


# What a shell reports of a program that SIGTERM has ended: the job is not done, start it again.
PREEMPTED = 128 + signal.SIGTERM


def check_choice(field, value, choices):
    """Raise an InputError unless the configuration field has one of the values `choices`.

    For fields of the type str: with an Enum, fairseq and hydra would answer a wrong name with a traceback.
    """
    if value not in choices:
        raise InputError(f"{field}={value} is unknown; choose from {', '.join(choices)}")


def check_numbers(field, values):
    """Raise an InputError unless the configuration field is a list of whole numbers, which fairseq does not check."""
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise InputError(f"{field}={values} must be a list of whole numbers")


def check_weight(field, value):
    """Raise an InputError unless the configuration field is a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        raise InputError(f"{field}={value} must be 0 or more, and finite")


def check_positive(option, value):
    """Raise an InputError unless the value of a command's option is a finite number above 0."""
    if not 0 < value < math.inf:
        raise InputError(f"{option} {value} must be more than 0, and finite")


def check_output(option, path, folder=False):
    """Raise an InputError unless a command can write its output to a path: a file or a folder, which need not exist.

    What lies above it is looked at too, so that no work is lost for want of a place.
    """
    path = Path(path)
    if path.exists() and path.is_dir() is not folder:
        raise InputError(
            f"{option} {path} is a {'file' if folder else 'folder'}; give a {'folder' if folder else 'file'}"
        )
    place = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not folder and place == path:
        place = path.absolute().parent
    if not place.is_dir():
        raise InputError(f"{option} {path}: {place} is a file and no folder; choose another place")
    if not os.access(place, os.W_OK):
        raise InputError(f"{option} {path}: {place} cannot be written; choose another place")


@contextmanager
def input_errors(what):
    """Turn whatever fails inside into an InputError that begins with `what` and ends with the reason.

    For a file's values on their way through code that does not expect a file's values, where one of
    the wrong kind fails wherever it is used first.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__} "
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{what}: {kind}{reason}".rstrip()) from None


def one_line_errors(function):
    """Let an InputError or TrainingStopped end the program with its one line on stderr and exit code 1.

    A preempted training ends it with the exit code PREEMPTED. This is for the functions with which a program starts; library
    code raises.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Preempted:
            raise SystemExit(PREEMPTED) from None
        except (InputError, TrainingStopped) as error:
            raise SystemExit(f"error: {error}") from None

    return wrapped
