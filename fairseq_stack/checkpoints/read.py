"""Reads fairseq's checkpoint files. No code in a file can run."""

import errno
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fairseq_stack.checkpoints.stand_ins import HARMLESS, HELD, plain, stand_ins
from fairseq_stack.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com"


class DamagedCheckpoint(InputError):
    """The file is cut off, altered or not a checkpoint."""


@contextmanager
def _only_safe_globals(classes: list[Any]) -> Iterator[None]:
    """Let torch.load accept `classes` and nothing else, whatever other code in this process has allowed.

    torch's own context manager adds to the list of allowed classes, and torch 2.4 lacks it.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_checkpoint(
    path: str | PathLike[str], header_only: bool = False, harmless_only: bool = False
) -> dict[str, Any]:
    """Read a fairseq checkpoint on the CPU. No code in the file can run.

    Args:
        path: the file.
        header_only: read the plain values and leave the tensors on disk.
        harmless_only: also refuse names that are harmless here but could run code in a plain unpickler.

    Returns:
        the dict that fairseq saved. `model` has the weights; `configurations` finds their configuration.

    Raises:
        DamagedCheckpoint: the file is damaged or not a checkpoint.
        InputError: the file does not exist, cannot be read, or holds objects that need code to unpickle.
    """
    state = read_torch_file(path, header_only, harmless_only)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise DamagedCheckpoint(f"{path} holds no model; give the file of a fairseq checkpoint")
    return state


def read_torch_file(path: str | PathLike[str], header_only: bool = False, harmless_only: bool = False) -> Any:
    """Read what torch.save wrote to a file, on the CPU, with stand-ins for objects. No code in the file can run.

    Arguments and errors: see load_checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {problem}; give the file of a fairseq checkpoint")
    check_fetched(path)
    zipped = _is_zip(path)  # torch before 1.6 wrote another format, without checksums
    if zipped and not header_only:
        try:
            check_whole(path)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{path}: {error}; copy it again") from None
    try:
        with _only_safe_globals(stand_ins(path, zipped, HARMLESS if harmless_only else HELD)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and header_only)
    except Exception as error:  # torch raises errors of many classes for damaged files
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise InputError(
                f"{path} needs {needed[1]} to unpickle, and that could run code; only tensors, plain values and the"
                " configurations and dictionaries of fairseq are loaded, so save the checkpoint again without it"
            ) from None
        if zipped and not header_only and "Unsupported operand" in str(error):  # the checksums are right
            raise InputError(
                f"{path} is pickled in another protocol than 2, torch's own; if you trust the file, load it with"
                " torch.load and save it again with torch.save"
            ) from None
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint that torch saved; give the file of a fairseq checkpoint"
        ) from None


def check_fetched(path: str | PathLike[str]) -> None:
    """Raise an InputError if a file is a pointer of Git LFS, whose content is still on the server."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if begins == LFS_POINTER:
        raise InputError(f"{path} is a pointer of Git LFS, not the file itself; git lfs pull fetches it")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # Python 3.10 raises this for some damaged zip files
        return True


def check_whole(path: str | PathLike[str]) -> None:
    """Compare every byte of a checkpoint with the checksums in the file. torch writes them but does not read them.

    Raises:
        DamagedCheckpoint: they differ, or the file is not a zip file. torch has written zip files since 1.6.
        InputError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DamagedCheckpoint(f"it is cut off or damaged ({error})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # offsets in a damaged zip file can be negative
            raise DamagedCheckpoint("it is cut off or damaged") from None
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if wrong:
        raise DamagedCheckpoint(f"the checksum of {wrong} is wrong")


def configurations(
    state: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]] | tuple[None, None]:
    """Return the configurations of model and task in a checkpoint's content, or (None, None) if it has none.

    They stand in `cfg`. Older versions of fairseq have one Namespace, `args`, with the fields of both. Its `arch`
    names the model.
    """
    for place in ("cfg", "args"):
        options = plain(state.get(place))
        if not isinstance(options, dict):
            continue
        model, task = options.get("model"), options.get("task")
        if not isinstance(model, dict) or not isinstance(task, dict):
            model = task = options if "arch" in options else None
        if model is not None and task is not None:
            return ({"_name": model["arch"], **model} if "arch" in model else model), task
    return None, None
