"""Find the newest whole checkpoint of a run, wherever a kill has hit it.

fairseq writes the first of its checkpoints beside and renames it, and copies the others from it; a
kill leaves temporary files, a `checkpoint_last.pt` that is older than what is there, or, without the
guard in fairseq_guards.py, one that is cut off. A crash of the machine can damage any of them.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from fairseq_stack.checkpoints.read import DamagedCheckpoint, check_whole, load_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.files import written_beside

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
UNFINISHED = ".tmp"  # what fairseq, too, adds to the name of a file that it is writing
# What fairseq calls its checkpoints: of an epoch, of an update, the best (or several), the last.
NAMES = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+|_last)\.pt")


def recover(folder):
    """Make `checkpoint_last.pt` the newest whole checkpoint in a folder, and log what had to be done.

    Newest is the one of the latest start of the run, and among those the one with the most updates: a start with
    checkpoint.reset_optimizer=true counts its updates from 0 again. Broken checkpoints that stand before it are kept under
    their name with `.broken` behind it; unfinished files are removed.

    Args:
        folder: fairseq's `checkpoint.save_dir`; it need not exist.

    Returns:
        the updates of checkpoint_last.pt, or None where there is no whole checkpoint.

    Raises:
        InputError: a checkpoint cannot be read, or it needs code to unpickle.
    """
    folder = Path(folder)
    last = folder / LAST
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in files:
        if path.name.endswith(UNFINISHED) and NAMES.fullmatch(path.name.removesuffix(UNFINISHED)):
            path.unlink()
            logger.info(f"recovery | removed {path}, which a kill has left unfinished")

    starts, updates, broken = {}, {}, {}
    for path in (path for path in files if NAMES.fullmatch(path.name)):
        try:
            starts[path], updates[path] = progress_of(path)
        except DamagedCheckpoint as error:
            broken[path] = error
    # Among checkpoints of the same update the one in place comes first.
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


def progress_of(path):
    """How often a run had been started when it saved a training checkpoint, and the updates that it had done.

    Raises:
        DamagedCheckpoint: the file is not a whole training checkpoint. Its tensors are not looked at.
        InputError: it cannot be read, or needs code to unpickle.
    """
    try:
        state = load_checkpoint(path, header_only=True)
    except DamagedCheckpoint:
        raise
    except InputError:
        check_whole(path)  # flipped bits can look like code
        raise
    try:
        state["extra_state"]["train_iterator"]["epoch"]
        history = state["optimizer_history"]
        return len(history), int(history[-1]["num_updates"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise DamagedCheckpoint("it holds no state to go on from") from None
