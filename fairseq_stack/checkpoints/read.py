"""Read fairseq's checkpoint files. Nothing in a file can run."""

import errno
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch

from fairseq_stack.checkpoints.stand_ins import HARMLESS, HELD, plain, stand_ins
from fairseq_stack.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com"


class DamagedCheckpoint(InputError):
    """The file is cut off, altered or no checkpoint at all."""


@contextmanager
def _only_safe_globals(classes):
    """Let torch.load accept `classes`, and nothing that someone else in this process has allowed.

    torch has a context manager of its own since 2.5; it adds to the list, and 2.4 lacks it.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_checkpoint(path, header_only=False, harmless_only=False):
    """Read a fairseq checkpoint on the CPU. Nothing in the file can run.

    Args:
        path: the file.
        header_only: leave the tensors on disk, so that only plain values are read.
        harmless_only: take nothing that could run where others unpickle the file, with what its names mean there.

    Returns:
        the dict that fairseq saved; `model` has the weights, and `configurations` finds what describes them.

    Raises:
        DamagedCheckpoint: the file is damaged or not a checkpoint.
        InputError: there is no such file, it cannot be read, or it holds objects that need code to
            unpickle.
    """
    state = read_torch_file(path, header_only, harmless_only)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise DamagedCheckpoint(f"{path} holds no model; give the file of a fairseq checkpoint")
    return state


def read_torch_file(path, header_only=False, harmless_only=False):
    """What torch.save has put into a file, on the CPU, with stand-ins for objects. Nothing in the file can run.

    Args and Raises: see load_checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {problem}; give the file of a fairseq checkpoint")
    check_fetched(path)
    zipped = _is_zip(path)  # torch's format before 1.6 is not, and has no checksums
    if zipped and not header_only:
        try:
            check_whole(path)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{path}: {error}; copy it again") from None
    try:
        with _only_safe_globals(stand_ins(path, zipped, HARMLESS if harmless_only else HELD)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and header_only)
    except Exception as error:  # what a damaged file makes torch raise has no common class
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise InputError(
                f"{path} needs {needed[1]} to unpickle, and that could run code; only tensors, plain values and the"
                " configurations and dictionaries of fairseq are loaded, so save the checkpoint again without it"
            ) from None
        if zipped and not header_only and "Unsupported operand" in str(error):  # of a file whose checksums are right
            raise InputError(
                f"{path} is pickled in another protocol than torch's own, 2; load it where you trust it, and torch.save"
                " writes it anew"
            ) from None
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint that torch saved; give the file of a fairseq checkpoint"
        ) from None


def check_fetched(path):
    """Raise InputError if git has cloned a file and left its content on the server."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if begins == LFS_POINTER:
        raise InputError(f"{path} is a pointer of Git LFS in the place of the file; git lfs pull fetches it")


def _is_zip(path):
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # Python 3.10 says so of some that are damaged
        return True


def check_whole(path):
    """Compare every byte of a checkpoint with the checksums in the file, which torch writes and does not read.

    Raises:
        DamagedCheckpoint: they differ, or the file is no zip file, as torch has written since 1.6.
        InputError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DamagedCheckpoint(f"it is cut off or damaged ({error})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged zip file sends its reader to places before its beginning
            raise DamagedCheckpoint("it is cut off or damaged") from None
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if wrong:
        raise DamagedCheckpoint(f"the checksum of {wrong} is wrong")


def configurations(state):
    """The configurations of model and task in a checkpoint's content, or (None, None) where there are none.

    They stand in `cfg`. Before fairseq had that, the fields of both were in one Namespace, `args`, where `arch` names
    the model.
    """
    for place in ("cfg", "args"):
        options = plain(state.get(place))
        if not isinstance(options, dict):
            continue
        model, task = options.get("model"), options.get("task")
        if not isinstance(model, dict) or not isinstance(task, dict):
            model = task = options if "arch" in options else None
        if model is not None:
            return ({"_name": model["arch"], **model} if "arch" in model else model), task
    return None, None
