"""Targets on disk, so that a frozen teacher processes each recording only once.

    DIR/<teacher>/teacher.json                      the teacher's shape, to be known without loading it
    DIR/<teacher>/<arrays>.<format>/<shard>.tar     the targets of many windows of recordings (shards.py)
    DIR/<teacher>/codebooks/<layer>.<format>...     the codebooks of a layer, for a format of codes

<teacher> is a hash of the teacher's files. <arrays> are numbers of layers, and `cnn` for the features of
the teacher's CNN. An entry is the targets of one window: a plain npz file for numpy.load. It holds a CRC-32 of every
array and says which audio it was made from, and with which codebooks. Any number of processes on any number of
machines fill a store together. An entry that two of them have computed is in the store twice, and either one is read.
Earlier versions stored each entry in a file of its own, <arrays>.<format>/ab/cdef...npz, which is still read.
"""

import hashlib
import io
import logging
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.targets.codebooks import Codebooks, read_codebooks, write_codebooks
from fairseq_stack.targets.formats import codebook_shape, decode, encode, frame_bytes, parts_of
from fairseq_stack.targets.shards import ENDING, Part, Place, Shards, listed

if TYPE_CHECKING:
    from fairseq_stack.data.dataset import SpeechDataset

logger = logging.getLogger(__name__)

CNN = "cnn"
Array: TypeAlias = int | str  # a layer, or CNN
Count = TypeVar("Count", int, np.ndarray)
OVERHEAD = 2048  # approximate bytes of an entry besides its values
ZIP_HEADER = 30  # bytes of the zip format's local header, without the file's name
NPY_HEADER = 512  # more bytes than the header of an array takes
WRITERS = 4  # threads; checksums release Python's global lock


@dataclass(frozen=True)
class Entry:
    """The store's entry for one window of a recording, stored or still to be stored.

    Attributes:
        name: of the entry, from the recording's path in the manifest and the window.
        utterance: the recording's path in the manifest, for messages.
        frames: the teacher's frames of the window.
        digest: hash of the window's samples; None before they are read.
        source: size and time of the last change of the audio file; None before it is read.
        problem: why the stored entry cannot be used; None if it can be, or if nothing is stored.
    """

    name: str
    utterance: str
    frames: int
    digest: str | None = None
    source: str | None = None
    problem: str | None = None


class TargetStore:
    """The entries for one teacher, one choice of arrays and one format.

    If a store in the folder already holds these arrays and more, that store is used.

    Args:
        folder: the teacher's folder; made if missing.
        layers: numbers of the teacher's layers.
        cnn: whether the CNN's features are stored too.
        form: the name of a format (formats.py).
        width: features of a layer.
        conv_layers: [(channels, kernel, stride)], by which the teacher counts frames.

    Attributes:
        wanted: the arrays to read, a list of layers (ints) and CNN.
        arrays: the arrays to write: all that entries of this store hold.
        shards: the Shards with the entries.
        codebooks: {layer: Codebooks}, as far as they are learned; empty for a format without codebooks.

    Raises:
        InputError: the folder cannot be made or written to, or has codebooks that cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Sequence[int],
        cnn: bool,
        form: str,
        width: int,
        conv_layers: Sequence[tuple[int, int, int]],
    ) -> None:
        self.wanted: list[Array] = [*layers, CNN] if cnn else list(layers)
        self.form = form
        self.conv_layers = conv_layers
        self.width = width
        self._writer: ThreadPoolExecutor | None = None  # a thread inside `writing_beside`
        self._writing: Future | None = None  # the batch that the thread is writing
        self.arrays: list[Array] = min(_supersets(folder, self.wanted, form), key=len, default=self.wanted)
        self.folder = os.path.join(folder, f"{'+'.join(map(str, self.arrays))}.{form}")
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise self._failure(error) from None
        self.shards = Shards(self.folder)
        self.shape = codebook_shape(form)
        if self.shape and self.shape[0] > width:
            raise InputError(f"task.target_format={form} has more codebooks than the teacher has features: {width}")
        self.teacher_folder = Path(folder)
        self.codebooks: dict[Array, Codebooks] = {}
        for name in self._coded:
            learned = self._read_codebooks(name)
            if learned is not None:
                self.codebooks[name] = learned

    @property
    def without_codebooks(self) -> list[int]:
        """The layers whose codebooks must be learned before anything can be stored."""
        return [layer for layer in self._coded if layer not in self.codebooks]

    def version(self, names: Sequence[Array]) -> str | None:
        """Return what identifies the codebooks of some layers by their contents; None without codebooks."""
        if not self.codebooks or self.without_codebooks:
            return None
        digests = "".join(self.codebooks[name].digest for name in names if name in self.codebooks)
        return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    def keep_codebooks(self, layer: int, learned: Codebooks) -> None:
        """Store the codebooks of a layer. If another process has stored some, those are used.

        Raises:
            InputError: they cannot be written.
        """
        write_codebooks(learned, self._codebooks_path(layer), self.teacher_folder.name)
        self.codebooks[layer] = self._read_codebooks(layer) or learned

    @property
    def _coded(self) -> list[int]:
        return [name for name in self.arrays if isinstance(name, int)] if self.shape else []

    def _read_codebooks(self, layer: int) -> Codebooks | None:
        assert self.shape is not None
        return read_codebooks(self._codebooks_path(layer), self.teacher_folder.name, self.width, *self.shape)

    def _codebooks_path(self, layer: int) -> Path:
        return self.teacher_folder / "codebooks" / f"{layer}.{self.form}.safetensors"

    def entry(self, utterance: str, start: int, samples: int) -> Entry:
        """Return the Entry for `samples` samples, from the sample `start`, of the recording listed as `utterance`."""
        key = f"{utterance}\0{start}\0{samples}".encode(errors="surrogateescape")
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return Entry(name, utterance, frames_from_samples(samples, self.conv_layers))

    def read(self, entry: Entry) -> dict[Array, dict[str, Tensor]] | None:
        """Return the arrays of `wanted` in an entry.

        Args:
            entry: with the `digest` of its samples or, without that, with the `source`.

        Returns:
            {array: {part: tensor [T, D] or [T, 1]}}, or None where nothing is stored.

        Raises:
            UnusableEntry: the stored entry is damaged or about other audio.
        """
        problem = None
        for place in reversed(self.shards.places(entry.name)):  # the newest first
            try:
                return self._arrays(entry, place)
            except UnusableEntry as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def encode(self, arrays: Mapping[Array, Tensor], entries: Mapping[int, Entry]) -> dict[Array, dict[str, Tensor]]:
        """Return the targets of a batch in the store's format, {array: {part: [B, T, ...]}}.

        Args:
            arrays: {array: [B, T, D]} of all the store's `arrays`.
            entries: {row in the batch: Entry} of those that will be written.

        Raises:
            InputError: a value is not finite, and codes would hide it.
        """
        for name, values in arrays.items():
            if name in self.codebooks:
                finite = values.isfinite().all(-1).cpu()
                for row, entry in entries.items():
                    if not finite[row, : entry.frames].all():
                        raise self._not_finite(name, entry)
        return {name: encode(values, self._form(name), self._codebooks(name)) for name, values in arrays.items()}

    def decode(self, name: Array, parts: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [B, T, D] of an array, in fp32. `dtype` is that of Codebooks.decode."""
        return decode(parts, self._codebooks(name), dtype)

    def write(self, entries: Mapping[int, Entry], arrays: Mapping[Array, Mapping[str, Tensor]]) -> None:
        """Store the targets of some utterances of a batch.

        Args:
            entries: {row in the batch: Entry with digest and source}.
            arrays: {array: {part: [B, T, D] or [B, T, 1]}} of all the store's `arrays`.

        Raises:
            InputError: the disk is full, nothing can be written, or a value is not finite in this format.
        """
        if self._writer is None:
            return self._write_batch(entries, arrays)
        self._finish_writing()
        self._writing = self._writer.submit(self._write_batch, entries, arrays)

    @contextmanager
    def writing_beside(self) -> Iterator[None]:
        """Inside a `with` block, `write` returns at once: a batch is written while the next one is computed.

        The next `write` raises the error if a batch cannot be written; for the last batch, the end of the block does.
        At the end of the block everything is written.
        """
        with ThreadPoolExecutor(1) as self._writer:
            try:
                yield
                self._finish_writing()
            finally:
                self._writer = self._writing = None

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_batch(self, entries: Mapping[int, Entry], arrays: Mapping[Array, Mapping[str, Tensor]]) -> None:
        batch = {f"{name}.{part}": values.cpu() for name in arrays for part, values in arrays[name].items()}
        self.shards.refresh()  # another process may have stored some of these since they were looked for
        rows = [row for row, entry in entries.items() if entry.problem or not self.shards.places(entry.name)]
        one_at_a_time = threading.Lock()

        def write(row: int) -> None:
            entry = entries[row]
            content = self._npz(entry, {name: values[row, : entry.frames].numpy() for name, values in batch.items()})
            with one_at_a_time:
                self.shards.append(entry.name, content)

        try:
            with ThreadPoolExecutor(WRITERS) as pool:
                list(pool.map(write, rows))
        except OSError as error:
            raise self._failure(error) from None
        self.shards.refresh()  # this process, and data workers that it forks, read what it has written

    def names(self) -> set[str]:
        """Return the names of all stored entries, whole or damaged."""
        return self.shards.names()

    def plan(self, dataset: "SpeechDataset") -> tuple[int, int, int]:
        """Return what it takes to store all windows of a SpeechDataset.

        Returns:
            the number of windows, the number of windows without an entry, and the bytes that these will take.
        """
        missing, names = dataset.window_counts.copy(), self.names()
        if names:  # an empty store holds no window
            for index, count in enumerate(dataset.window_counts.tolist()):
                missing[index] -= sum(dataset.entry(index, number).name in names for number in range(count))
        frames = frames_from_samples(torch.from_numpy(dataset.sizes), self.conv_layers).numpy()
        return int(dataset.window_counts.sum()), int(missing.sum()), int((missing * self.bytes(frames)).sum())

    def bytes(self, frames: Count) -> Count:
        """Return the approximate bytes of an entry of `frames` frames (an int, or an integer array)."""
        return OVERHEAD + frames * sum(frame_bytes(self._form(name), self._width(name)) for name in self.arrays)

    def check_space(self, missing_bytes: int, what: str) -> int:
        """Return the free bytes of the disk.

        Raises:
            InputError: they are fewer than `missing_bytes`, which the store needs for `what`.
        """
        free = shutil.disk_usage(self.folder).free
        if missing_bytes > free:
            raise InputError(
                f"task.target_store={self.folder} needs {size_text(missing_bytes)} more for {what}, but the disk"
                f" has {size_text(free)} free; choose a larger one, fewer layers or a smaller task.target_format,"
                " such as pq64"
            )
        return free

    def _form(self, name: Array) -> str:
        # The CNN's features are the student's input, not only what it learns.
        return "int8" if name == CNN and self.shape else self.form

    def _codebooks(self, name: Array) -> Codebooks | None:
        return self.codebooks[name] if self.shape and isinstance(name, int) else None

    def _width(self, name: Array) -> int:
        return self.conv_layers[-1][0] if name == CNN else self.width

    def _arrays(self, entry: Entry, place: Place) -> dict[Array, dict[str, Tensor]]:
        where = f"{entry.name}{ENDING} in {place.path}"
        try:
            with self.shards.open(entry.name, place) as file, zipfile.ZipFile(file) as archive:
                digest, source, *version = read_array(file, archive, "audio").tolist()
                if entry.source != source if entry.digest is None else entry.digest != digest:
                    raise UnusableEntry(f"{where} is about other audio")
                if version != self._version:
                    raise UnusableEntry(f"{where} was made with other codebooks")
                return {name: self._parts(file, archive, name, entry.frames) for name in self.wanted}
        except UnusableEntry:
            raise
        except Exception as error:  # damage can break any of the zip format's and numpy's rules
            raise UnusableEntry(f"{where} is damaged ({type(error).__name__}: {error})") from None

    def _parts(self, file: Part, archive: zipfile.ZipFile, name: Array, frames: int) -> dict[str, Tensor]:
        parts = {}
        for part, size in parts_of(self._form(name), self._width(name)).items():
            values = parts[part] = read_array(file, archive, f"{name}.{part}")
            if values.shape != (frames, size):
                raise ValueError(f"{name} has the shape {values.shape}")
        return {part: torch.from_numpy(values) for part, values in parts.items()}

    def _npz(self, entry: Entry, values: Mapping[str, Any]) -> memoryview:
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise self._not_finite(name.split(".")[0], entry)
        file = io.BytesIO()
        np.savez(file, audio=np.array([entry.digest, entry.source, *self._version]), **values)
        return file.getbuffer()

    @property
    def _version(self) -> list[str]:
        version = self.version(self.arrays)
        return [version] if version else []

    def _not_finite(self, name: Array, entry: Entry) -> InputError:
        advice = "choose int8, or look for" if self.form == "fp16" else "look for"
        title = "CNN" if name == CNN else f"layer {name}"
        return InputError(
            f"the teacher's {title} for {entry.utterance} is not finite in task.target_format={self.form}; {advice}"
            " what is wrong with the teacher"
        )

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"task.target_store={self.folder} cannot be written ({error.strerror}); what it holds stays good:"
            " make room or choose another folder, and start again"
        )


class UnusableEntry(Exception):
    """An entry that must be computed again. The message is one line."""


def waveform_digest(waveform: Tensor) -> str:
    """Return the SHA-256 of float32 samples [S], which identifies a piece of audio."""
    return hashlib.sha256(np.ascontiguousarray(waveform).data).hexdigest()


def file_source(path: str | Path) -> str:
    """Return a file's size and time of its last change, by which a change is noticed; raises OSError."""
    status = os.stat(path)
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def size_text(count: float) -> str:
    """Return a number of bytes as text, such as 812 MB or 1.4 TB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _supersets(folder: str | Path, wanted: Sequence[Array], form: str) -> Iterator[list[Array]]:
    """Yield the arrays of each store in a teacher's folder that has this format and holds all that are wanted."""
    for name in listed(folder):
        arrays, _, ending = name.rpartition(".")
        arrays = [int(array) if array.isdigit() else array for array in arrays.split("+")]
        if ending == form and set(wanted) <= set(arrays):
            yield arrays


def read_array(file: Part, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an npz file, without the two further copies that ZipFile.read and numpy.load would make.

    Raises:
        Exception: the file is damaged; of any kind.
    """
    member = archive.getinfo(f"{name}.npy")
    # At the end of a zip file's local header are two lengths: of the member's name, and of extra fields behind it.
    file.seek(member.header_offset + ZIP_HEADER - 4)
    start = member.header_offset + ZIP_HEADER + sum(np.frombuffer(file.read(4), "<u2").tolist())
    file.seek(start)
    stored = np.empty(member.file_size, np.uint8)
    file.readinto(stored.data)
    if zlib.crc32(stored.data) != member.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
    header = io.BytesIO(stored[:NPY_HEADER].tobytes())
    np.lib.format.read_magic(header)
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(header)  # numpy writes a transposed array by columns
    return stored[header.tell() :].view(dtype).reshape(shape, order="F" if by_columns else "C")
