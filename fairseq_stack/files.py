"""Files that are written whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

from fairseq_stack.errors import InputError


class CannotWrite(InputError):
    """A file cannot be written: no permission, no room, or no folder."""


@contextmanager
def written_beside(path, name=None, suffix=".part"):
    """A path beside `path` to write a file to, which takes the place of `path` at the end; for what is no text in memory.

    Nothing half-written is left behind when the work fails. The folder is made where it is missing.

    Args:
        path: of the file; what is there is replaced.
        name: the option or field that the path comes from, with its value, for the message (default: the path).
        suffix: what the file is called meanwhile; processes that may write the same file at once need different ones.

    Raises:
        CannotWrite: the file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise CannotWrite(
            f"{name or f'{path}:'} cannot be written ({reason}); make room or choose another place"
        ) from None


def write_whole(path, content, name=None):
    """Write bytes or text as a whole or not at all; see written_beside.

    Args:
        content: bytes, or a text that becomes UTF-8. File names that are no UTF-8 keep their bytes.

    Raises:
        CannotWrite: the file cannot be written.
    """
    with written_beside(path, name) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
