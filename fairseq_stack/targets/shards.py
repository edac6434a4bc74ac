"""Small files packed into large ones, because network disks are slow with very many files.

    DIR/<shard>.tar      files, one behind another, uncompressed
    DIR/<shard>.index    where they are, so that nobody searches the tar: a row of ROW for each

Each process appends to shards of its own, so nobody needs a lock. A file is in the tar, and the tar is closed (which
on NFS shows it to other machines), before its row is in the index. So readers find whole files only, and a kill costs
no more than the file that is being written. If an index is lost, the headers in the tar take its place.
"""

import io
import math
import os
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ROW = np.dtype([("name", "S16"), ("offset", "<u8"), ("size", "<u8")])  # the header's offset, the file's size
NUMBERED = np.dtype([*ROW.descr, ("shard", "<i4")])
SHARD_BYTES = 256 * 10**6  # a shard of this size gets no further file
REFRESH_SECONDS = 10  # between two looks for what other processes have written
TAR, INDEX, ENDING = ".tar", ".index", ".npz"


class Place(NamedTuple):
    """Where a file is: the path of a tar, the offset of the file's header there, and the file's size.

    The offset is None if the path is that of the file itself.
    """

    path: str
    offset: int | None
    size: int


class _Known(NamedTuple):
    """What a process knows of the shards. A thread replaces it as a whole."""

    shards: list[str]
    read: list[float]  # bytes of each index; infinite if nothing will follow
    files: np.ndarray  # of NUMBERED, sorted by name; forked data workers share its memory


NOTHING = _Known([], [], np.empty(0, NUMBERED))


class Shards:
    """The files in the shards of a folder. A name has 32 hexadecimal digits.

    Files that are not in shards are read, too, from DIR/<first two digits>/<the others>.npz.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._known = NOTHING
        self._refreshed = -math.inf
        self._own = ("", 0)  # a shard, and the process that appends to it

    def names(self) -> set[str]:
        """Return the names of all files that are there now."""
        folders = [os.path.join(self.folder, name) for name in listed(self.folder) if len(name) == 2]
        alone = {folder[-2:] + name.removesuffix(ENDING) for folder in folders for name in listed(folder)}
        self.refresh()
        text = self._known.files["name"].tobytes().hex()
        return alone.union(text[start : start + 32] for start in range(0, len(text), 32))

    def places(self, name: str) -> list[Place]:
        """Return where the files of this name are: in most cases one or none.

        Those that were written since the last `refresh` may be missing. A name that is missing refreshes, if the last
        time is REFRESH_SECONDS ago.
        """
        found = self._find(name)
        if not found and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.refresh()
            found = self._find(name)
        alone = os.path.join(self.folder, name[:2], name[2:] + ENDING)
        return [Place(alone, None, os.path.getsize(alone))] if not found and os.path.exists(alone) else found

    @contextmanager
    def open(self, name: str, place: Place) -> Iterator["Part"]:
        """Give a `with` block a file, to be read.

        Raises:
            Exception: the file is damaged or gone; of any kind.
        """
        with open(place.path, "rb") as file:
            if place.offset is None:
                yield Part(file, 0, place.size)
                return
            file.seek(place.offset)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "ascii", "strict")
            if (header.name, header.size) != (name + ENDING, place.size):
                raise ValueError(f"{header.name} is at {place.offset}")
            yield Part(file, place.offset + tarfile.BLOCKSIZE, place.size)

    def append(self, name: str, content: bytes | memoryview) -> None:
        """Write a file; `refresh` finds it.

        Raises:
            OSError: the disk is full, or nothing can be written there. What was there before stays.
        """
        if self._own[1] != os.getpid():  # also in a fork of a process that writes
            self._own = (self._start_shard(), os.getpid())
        shard = self._own[0]
        header = tarfile.TarInfo(name + ENDING)
        header.size, header.mtime = len(content), int(time.time())
        offset = os.path.getsize(shard + TAR)
        try:
            with open(shard + TAR, "ab") as file:
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content)
                file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
            with open(shard + INDEX, "ab") as file:
                file.write(np.array((bytes.fromhex(name), offset, len(content)), ROW).tobytes())
        except OSError:
            self._own = ("", 0)  # the index may end with half a row
            with suppress(OSError):
                os.truncate(shard + TAR, offset)
            raise
        if offset + len(content) >= SHARD_BYTES:
            self._own = ("", 0)

    def refresh(self) -> None:
        """Look for what this process and others have written."""
        self._refreshed = time.monotonic()
        tars = {os.path.join(self.folder, name)[: -len(TAR)] for name in listed(self.folder) if name.endswith(TAR)}
        known = self._known if tars.issuperset(self._known.shards) else NOTHING  # somebody may have deleted some
        shards = [*known.shards, *sorted(tars.difference(known.shards))]
        read = [*known.read, *[0] * (len(shards) - len(known.read))]
        found = [NOTHING.files]
        for number, shard in enumerate(shards):
            if read[number] == math.inf:
                continue
            rows, read[number] = _rows(shard, int(read[number]))
            if len(rows):
                numbered = np.empty(len(rows), NUMBERED)
                numbered[["name", "offset", "size"]], numbered["shard"] = rows, number
                found.append(numbered)
        new = np.concatenate(found)
        new = new[np.argsort(new["name"], kind="stable")]
        files = np.insert(known.files, np.searchsorted(known.files["name"], new["name"], "right"), new)
        self._known = _Known(shards, read, files)

    def _find(self, name: str) -> list[Place]:
        shards, _, files = self._known
        key = bytes.fromhex(name)
        first, last = (np.searchsorted(files["name"], key, side) for side in ("left", "right"))
        return [Place(shards[row["shard"]] + TAR, int(row["offset"]), int(row["size"])) for row in files[first:last]]

    def _start_shard(self) -> str:
        os.makedirs(self.folder, exist_ok=True)
        shard = os.path.join(self.folder, uuid.uuid4().hex)
        for ending in (INDEX, TAR):  # in this order, because a tar without an index has lost it
            open(shard + ending, "xb").close()
        return shard


class Part(io.RawIOBase):
    """Bytes of an open file, as a file of their own, because a zip file's directory is at its end."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.position)])
        self.position += count
        return count


def listed(folder: str | os.PathLike) -> list[str]:
    """Return the names in a folder; none if there is no such folder."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _rows(shard: str, start: int) -> tuple[np.ndarray, float]:
    """Return the rows of a shard's index from a byte on, and the byte from which others may follow."""
    try:
        with open(shard + INDEX, "rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return _searched(shard + TAR), math.inf
    rows = np.frombuffer(content, ROW, len(content) // ROW.itemsize)
    full = len(rows) and int(rows["offset"][-1]) + int(rows["size"][-1]) >= SHARD_BYTES
    return rows, math.inf if full else start + rows.nbytes


def _searched(tar: str) -> np.ndarray:
    """Return the rows of an index for a tar, as far as the tar is whole."""
    rows = []
    with suppress(tarfile.ReadError, FileNotFoundError), tarfile.open(tar, "r:") as archive:
        end = os.path.getsize(tar)
        for file in archive:
            if file.offset_data + file.size <= end:
                rows.append((bytes.fromhex(file.name.removesuffix(ENDING)), file.offset, file.size))
    return np.array(rows, ROW)
