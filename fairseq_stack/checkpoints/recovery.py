"""Finds the newest whole checkpoint of a run after a kill or a crash.

fairseq writes its first checkpoint to a temporary file, renames it, and copies the others from it. A kill can leave
temporary files and a `checkpoint_last.pt` that is older than other checkpoints. Without the guard in
training/guards.py, it can also leave one that is cut off. A crash of the machine can damage any of them.
"""

import logging
import os
import re
import shutil
from os import PathLike
from pathlib import Path

from fairseq_stack.checkpoints.read import DamagedCheckpoint, check_whole, load_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.files import written_beside

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
UNFINISHED = ".tmp"  # fairseq, too, adds this to the name of a file while it writes it
# fairseq's names of checkpoints: of an epoch, of an update, the best (or several), the last.
NAMES = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+|_last)\.pt")


def recover(folder: str | PathLike[str]) -> int | None:
    """Make the newest whole checkpoint in a folder its `checkpoint_last.pt`, and log every change.

    The newest checkpoint comes from the latest start of the run, and has the most updates of that start. A start with
    checkpoint.reset_optimizer=true counts its updates from 0 again. Unfinished files are removed. Broken checkpoints
    that are newer than the newest whole one are renamed: `.broken` is added to their name.

    Args:
        folder: fairseq's `checkpoint.save_dir`; it need not exist.

    Returns:
        the number of updates of checkpoint_last.pt, or None if there is no whole checkpoint.

    Raises:
        InputError: a checkpoint cannot be read, or it needs code to unpickle.
    """
    folder = Path(folder)
    last = folder / LAST
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in files:
        if path.name.endswith(UNFINISHED) and NAMES.fullmatch(path.name.removesuffix(UNFINISHED)):
            path.unlink()
            logger.info(f"recovery | removed {path}, a file that a kill left unfinished")

    starts, updates, broken = {}, {}, {}
    for path in (path for path in files if NAMES.fullmatch(path.name)):
        try:
            starts[path], updates[path] = progress_of(path)
        except DamagedCheckpoint as error:
            broken[path] = error
    # Among checkpoints of the same update, checkpoint_last.pt comes first: it needs no copy.
    for path in sorted(updates, key=lambda path: (starts[path], updates[path], path == last), reverse=True):
        try:
            check_whole(path)
            newest = path
            break
        except DamagedCheckpoint as error:
            broken[path] = error
    else:
        newest = None

    for path, reason in broken.items():
        os.replace(path, f"{path}.broken")
        logger.warning(f"recovery | skipped {path}: {reason}; it is now {path.name}.broken")
    if newest is None:
        if broken:
            logger.warning(f"recovery | no whole checkpoint is left in {folder}; training starts from the beginning")
        return None
    if newest != last:
        found = f"was at update {updates[last]}" if last.exists() else "was missing or broken"
        with written_beside(last, suffix=UNFINISHED) as beside:
            shutil.copyfile(newest, beside)
        logger.warning(
            f"recovery | {newest.name} at update {updates[newest]} is the newest whole checkpoint and becomes"
            f" {last}, which {found}"
        )
    return updates[newest]


def progress_of(path: str | PathLike[str]) -> tuple[int, int]:
    """Return the number of starts and the number of updates of a run when it saved a training checkpoint.

    Raises:
        DamagedCheckpoint: the file is not a whole training checkpoint. The tensors are not checked.
        InputError: the file cannot be read, or needs code to unpickle.
    """
    try:
        state = load_checkpoint(path, header_only=True)
    except DamagedCheckpoint:
        raise
    except InputError:
        check_whole(path)  # a damaged pickle can seem to need code
        raise
    try:
        state["extra_state"]["train_iterator"]["epoch"]
        history = state["optimizer_history"]
        return len(history), int(history[-1]["num_updates"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise DamagedCheckpoint("it holds no training state to resume from") from None
