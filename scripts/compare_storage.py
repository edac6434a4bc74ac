"""Compare formats that can hold a store's entries: size, time to write and to read, and what a kill loses.

    pip install lmdb pylance webdataset zarr
    python scripts/compare_storage.py FOLDER [--entries 64] [--frames 600] [--width 768] [--type float16]

An entry has three layers. Each format gets the same values, 16 entries at a time. Times are medians. A batch is 16
random entries (for webdataset, which has no random access, the next 16). `cold` is without the operating system's cache
of FOLDER's files.
"""

import io
import os
import random
import shutil
import statistics
import time
import zipfile
from abc import ABC, abstractmethod
from argparse import ArgumentParser
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import lance
import lmdb
import numpy as np
import pyarrow
import safetensors.numpy
import webdataset
import zarr

from fairseq_stack.tables import markdown_table
from fairseq_stack.targets.shards import ENDING, Shards
from fairseq_stack.targets.store import read_array

LAYERS, BATCH, SHARD = "248", 16, 32  # entries


class Files:
    """A file for each entry, written beside and renamed, and read as the store reads it."""

    name = "a file each"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.shards = Shards(str(folder))

    def write(self, names: list[str], entries: list[dict]) -> None:
        for name, entry in zip(names, entries, strict=True):
            (self.folder / "beside").write_bytes(packed(entry))
            (self.folder / name[:2]).mkdir(exist_ok=True)
            os.replace(self.folder / "beside", self.folder / name[:2] / f"{name[2:]}{ENDING}")

    def close(self) -> None:
        pass

    def read(self, names: list[str]) -> list[dict]:
        entries = []
        for name in names:
            place = self.shards.places(name)[0]
            with self.shards.open(name, place) as file, zipfile.ZipFile(file) as archive:
                entries.append({layer: read_array(file, archive, layer) for layer in LAYERS})
        return entries


class Tar(Files):
    """The store's shards."""

    name = "tar and index"

    def write(self, names: list[str], entries: list[dict]) -> None:
        for name, entry in zip(names, entries, strict=True):
            self.shards.append(name, packed(entry))


class WebDataset(Files):
    """Tars that are read from their beginning."""

    name = "webdataset"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.writer = self.reader = None

    def write(self, names: list[str], entries: list[dict]) -> None:
        self.writer = self.writer or webdataset.ShardWriter(f"{self.folder}/%05d.tar", maxcount=SHARD, verbose=0)
        for name, entry in zip(names, entries, strict=True):
            self.writer.write({"__key__": name, "npz": packed(entry)})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def read(self, names: list[str]) -> list[dict]:
        if self.reader is None:
            tars = sorted(map(str, self.folder.glob("*.tar")))
            self.reader = iter(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).repeat())
        return [unpacked(next(self.reader)["npz"]) for _ in names]


class Lmdb(Files):
    """An environment; a batch is a transaction."""

    name = "lmdb"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = lmdb.open(str(folder), map_size=2**40)

    def write(self, names: list[str], entries: list[dict]) -> None:
        with self.environment.begin(write=True) as transaction:
            for name, entry in zip(names, entries, strict=True):
                transaction.put(name.encode(), packed(entry))

    def close(self) -> None:
        self.environment.close()

    def read(self, names: list[str]) -> list[dict]:
        with self.environment.begin(buffers=True) as transaction:
            return [unpacked(transaction.get(name.encode())) for name in names]


class Whole(Files, ABC):
    """A base for formats whose shards are written as a whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.waiting: dict[str, dict] = {}
        self.count = 0
        self.places: dict[str, Any] = {}  # {name: where it is}

    def write(self, names: list[str], entries: list[dict]) -> None:
        self.waiting.update(zip(names, entries, strict=True))
        if len(self.waiting) >= SHARD:
            self.close()

    def close(self) -> None:
        if self.waiting:
            self.write_shard()
            self.waiting, self.count = {}, self.count + 1

    @abstractmethod
    def write_shard(self) -> None:
        """Write what waits, as one file."""


class Safetensors(Whole):
    """A file for each shard."""

    name = "safetensors"

    def write_shard(self) -> None:
        tensors = {f"{name}.{layer}": values for name in self.waiting for layer, values in self.waiting[name].items()}
        path = self.folder / f"{self.count}.safetensors"
        safetensors.numpy.save_file(tensors, f"{path}.part")
        os.replace(f"{path}.part", path)

    def read(self, names: list[str]) -> list[dict]:
        if not self.places:
            for path in self.folder.glob("*.safetensors"):
                with safetensors.safe_open(path, "np") as file:
                    self.places.update((key.split(".")[0], path) for key in file.keys())  # noqa: SIM118
        entries = []
        for name in names:
            with safetensors.safe_open(self.places[name], "np") as file:
                entries.append({layer: file.get_tensor(f"{name}.{layer}") for layer in LAYERS})
        return entries


class Zarr(Whole):
    """An array for each shard and layer, with a chunk and its checksum for each entry."""

    name = "zarr"

    def write_shard(self) -> None:
        for layer in LAYERS:
            values = np.stack([entry[layer] for entry in self.waiting.values()])
            path = self.folder / f"{self.count}.{layer}"
            shape = {"shape": values.shape, "shards": values.shape, "chunks": (1, *values.shape[1:])}
            array = zarr.create_array(path, dtype=values.dtype, compressors=None, **shape)
            array[:] = values
            array.attrs["names"] = list(self.waiting)

    def read(self, names: list[str]) -> list[dict]:
        if not self.places:
            for path in self.folder.glob(f"*.{LAYERS[0]}"):
                if stored := zarr.open_array(path, mode="r").attrs.get("names"):
                    self.places.update((name, (path.with_suffix(""), row)) for row, name in enumerate(stored))
            self.arrays = {}
        entries = []
        for name in names:
            path, row = self.places[name]
            for layer in LAYERS:
                key = f"{path}.{layer}"
                self.arrays.setdefault(key, None)
                self.arrays[key] = self.arrays[key] or zarr.open_array(key, mode="r")
            entries.append({layer: self.arrays[f"{path}.{layer}"][row] for layer in LAYERS})
        return entries


class Lance(Files):
    """A table of names and npz files; a batch is a version of it."""

    name = "Lance"

    def write(self, names: list[str], entries: list[dict]) -> None:
        columns = {"name": names, "npz": pyarrow.array(map(packed, entries), pyarrow.large_binary())}
        exists = (self.folder / "_versions").exists()
        lance.write_dataset(pyarrow.table(columns), str(self.folder), mode="append" if exists else "create")

    def read(self, names: list[str]) -> list[dict]:
        if not hasattr(self, "table"):
            self.table = lance.dataset(str(self.folder))
            stored = self.table.to_table(columns=["name"])["name"].to_pylist()
            self.rows = {name: row for row, name in enumerate(stored)}
        found = self.table.take([self.rows[name] for name in names], columns=["npz"])["npz"]
        return [unpacked(memoryview(each.as_buffer())) for each in found]


def packed(entry: dict) -> bytes:
    file = io.BytesIO()
    np.savez(file, **entry)
    return file.getvalue()


def unpacked(content: bytes | memoryview) -> dict:
    with np.load(io.BytesIO(content)) as archive:
        return dict(archive)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--type", default="float16")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shape = args.frames, args.width, args.type
    rows = []
    kinds = (Files, Tar, WebDataset, Lmdb, Safetensors, Zarr, Lance)
    # First, because Lance does not bear a fork after it was used.
    lost = {kind: lost_by_a_kill(kind, args.folder / "killed", args.entries, shape) for kind in kinds}
    for kind in kinds:
        folder = args.folder / "whole"
        writing, size = written(kind, folder, args.entries, shape)
        made = kind(folder)
        cold, warm = (read(made, args.entries, shape, cold) for cold in (True, False))
        made.close()
        shutil.rmtree(folder)
        beside = size / args.entries - len(LAYERS) * np.empty(shape[:2], shape[2]).nbytes
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in (writing, warm, cold)]
        rows.append([kind.name, f"{beside:.0f}", *milliseconds, lost[kind]])
    titles = [
        "format",
        "bytes beside the values",
        "write an entry, ms",
        "read a batch, ms",
        "cold, ms",
        "lost by a kill",
    ]
    print(markdown_table(titles, rows))


def batches(count: int, shape: tuple[int, int, str]) -> Iterator[tuple[list[str], list[dict]]]:
    """Yield names and entries, 16 at a time; the first value of an entry is its number."""
    chance = np.random.default_rng(0)
    for start in range(0, count, BATCH):
        entries = [
            {layer: chance.integers(0, 256, shape[:2]).astype(shape[2]) for layer in LAYERS} for _ in range(BATCH)
        ]
        for number, entry in enumerate(entries, start):
            entry[LAYERS[0]][0, :2] = divmod(number, 100)
        yield [name_of(number) for number in range(start, start + BATCH)], entries


def name_of(number: int) -> str:
    return f"{random.Random(number).getrandbits(128):032x}"


def written(kind: type[Files], folder: Path, count: int, shape: tuple) -> tuple[float, int]:
    """Return seconds for an entry, and bytes of all."""
    made, times = kind(folder), []
    for names, entries in batches(count, shape):
        started = time.perf_counter()
        made.write(names, entries)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    made.close()
    last = time.perf_counter() - started
    # Of formats that write a shard at a time, all the batches of a shard count.
    seconds = (sum(times) + last) / count if issubclass(kind, Whole) else statistics.median(times) / BATCH
    return seconds, sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def read(made: Files, count: int, shape: tuple, cold: bool) -> float:
    """Return the median seconds of a batch."""
    order, times = random.Random(0), []
    for _ in range(6 if cold else 16):
        numbers = order.sample(range(count), BATCH)
        if cold:
            forget(made)
        started = time.perf_counter()
        found = made.read([name_of(number) for number in numbers])
        times.append(time.perf_counter() - started)
        for number, entry in zip(numbers, found, strict=True):
            right = isinstance(made, WebDataset) or tuple(entry[LAYERS[0]][0, :2]) == divmod(number, 100)
            assert right and all(values.shape == shape[:2] for values in entry.values())
    return statistics.median(times[1:])  # the first one opens files


def forget(made: Files) -> None:
    if isinstance(made, Lmdb):
        made.close()  # the cache keeps what is mapped into memory
    for path in made.folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if isinstance(made, Lmdb):
        made.__init__(made.folder)


def lost_by_a_kill(kind: type[Files], folder: Path, count: int, shape: tuple) -> str:
    """Kill a process that has written five sixths; return how many of those entries cannot be read then."""
    forking = get_context("fork")
    count = count * 5 // 6 // BATCH * BATCH
    written_all, never = forking.Event(), forking.Event()
    process = forking.Process(target=write_and_wait, args=(kind, folder, count, shape, written_all, never))
    process.start()
    written_all.wait()
    process.kill()
    process.join()
    made, lost = kind(folder), 0
    for number in range(count):
        try:
            (entry,) = made.read([name_of(number)])
            lost += tuple(entry[LAYERS[0]][0, :2]) != divmod(number, 100)
        except Exception:  # each format has its own
            lost += 1
    made.close()
    shutil.rmtree(folder)
    return f"{lost} of {count}"


def write_and_wait(kind: type[Files], folder: Path, count: int, shape: tuple, written_all: Event, never: Event) -> None:
    made = kind(folder)
    for names, entries in batches(count, shape):
        made.write(names, entries)
    written_all.set()
    never.wait()


if __name__ == "__main__":
    main()
