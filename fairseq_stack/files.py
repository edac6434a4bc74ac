"""Writes files completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq_stack.errors import InputError


class CannotWrite(InputError):
    """A file cannot be written: no permission, no room, or no folder."""


@contextmanager
def written_beside(path: str | os.PathLike, name: str | None = None, suffix: str = ".part") -> Iterator[Path]:
    """Give a `with` block a temporary path beside `path`, and rename it to `path` at the end.

    A block that fails leaves no half-written file. Missing folders are created. Contents that are already in memory are
    easier to write with `write_whole`.

    Args:
        path: of the file; an existing file is replaced.
        name: the option or field that gave the path, with its value, for the error (default: the path).
        suffix: ending of the temporary name. Processes that may write the same file at once need different ones.

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


def write_whole(path: str | os.PathLike, content: bytes | str, name: str | None = None) -> None:
    """Write bytes or text completely or not at all; see written_beside.

    Args:
        path: of the file; an existing file is replaced.
        content: bytes, or text to encode as UTF-8. File names in it that are not UTF-8 keep their bytes.
        name: as for `written_beside`.

    Raises:
        CannotWrite: the file cannot be written.
    """
    with written_beside(path, name) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
