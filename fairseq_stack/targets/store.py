"""Targets on disk: what a frozen teacher makes of a recording is computed once.

    DIR/<teacher>/teacher.json                      what has to be known of the teacher without loading it
    DIR/<teacher>/<arrays>.<format>/ab/cdef...npz   the targets of one window of one recording
    DIR/<teacher>/<arrays>.<format>/unfinished/     what is being written

<teacher> is made from the content of the teacher's files; <arrays> are its layers, and `cnn` for the
features of its CNN. An entry is a plain npz file, which numpy.load opens and which holds a CRC-32 of
every array, and it says what audio it was made from. It is written beside and renamed: any number of
processes on any number of machines fill a store together, and a kill leaves no half entry.
"""

import hashlib
import io
import logging
import os
import shutil
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.targets.formats import BYTES, PARTS

logger = logging.getLogger(__name__)

CNN = "cnn"
UNFINISHED = "unfinished"
ABANDONED_SECONDS = 3600  # after which nobody is writing an unfinished file any more
OVERHEAD = 2048  # bytes of an entry besides its values, about
WRITERS = 4  # threads; writing and checksums release Python's global lock


@dataclass(frozen=True)
class Entry:
    """One window of a recording, whose targets are or will be in the store.

    Attributes:
        name: of the entry, from the recording's path in the manifest and the window.
        utterance: the recording's path in the manifest, for messages.
        frames: how many the teacher makes of the window.
        digest: of the window's samples; None as long as they have not been read.
        source: size and time of the last change of the audio file.
        problem: why a stored entry could not be used; None where there was none.
    """

    name: str
    utterance: str
    frames: int
    digest: str = None
    source: str = None
    problem: str = None


class TargetStore:
    """The entries for one teacher, one choice of arrays and one format.

    A store that is there already and holds more arrays than are asked for is used.

    Args:
        folder: the teacher's folder; made if missing.
        layers: numbers of the teacher's layers.
        cnn: whether the CNN's features are stored too.
        form: one of target_formats.FORMATS.
        width: features of a layer.
        conv_layers: [(channels, kernel, stride)], by which the teacher counts frames.

    Attributes:
        wanted: the arrays to read, a list of layers (ints) and CNN.
        arrays: the arrays to write, all that entries of this store hold.

    Raises:
        InputError: the folder cannot be made or written to.
    """

    def __init__(self, folder, layers, cnn, form, width, conv_layers):
        self.wanted = [*layers, CNN] if cnn else list(layers)
        self.form = form
        self.conv_layers = conv_layers
        self.width = width
        self._beside = self._writing = None  # a thread that writes, and the batch that it is writing
        self.arrays = min(_supersets(folder, self.wanted, form), key=len, default=self.wanted)
        self.folder = os.path.join(folder, f"{'+'.join(map(str, self.arrays))}.{form}")
        try:
            os.makedirs(os.path.join(self.folder, UNFINISHED), exist_ok=True)
            self._remove_abandoned()
        except OSError as error:
            raise self._failure(error) from None

    def entry(self, utterance, start, samples):
        """The Entry of `samples` samples from `start` on of the recording listed as `utterance`."""
        key = f"{utterance}\0{start}\0{samples}".encode(errors="surrogateescape")
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return Entry(name, utterance, frames_from_samples(samples, self.conv_layers))

    def read(self, entry):
        """Read the arrays of `wanted`.

        Args:
            entry: with the `digest` of its samples, or else the `source`.

        Returns:
            {array: {part: tensor [T, D] or [T, 1]}}, or None where nothing is stored.

        Raises:
            UnusableEntry: what is stored is damaged or about other audio.
        """
        path = self._path(entry)
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                digest, source = _array(archive, "audio").tolist()
                if entry.source != source if entry.digest is None else entry.digest != digest:
                    raise UnusableEntry(f"{path} is about other audio")
                stored = {name: self._parts(archive, name, entry.frames) for name in self.wanted}
        except FileNotFoundError:
            return None
        except UnusableEntry:
            raise
        except Exception as error:  # damage can break any of the zip format's and numpy's rules
            raise UnusableEntry(f"{path} is damaged ({type(error).__name__}: {error})") from None
        return stored

    def write(self, entries, arrays):
        """Store the targets of some utterances of a batch.

        Args:
            entries: {row in the batch: Entry with digest and source}.
            arrays: {array: {part: [B, T, D] or [B, T, 1]}}, all those of `arrays`.

        Raises:
            InputError: the disk is full, nothing can be written, or a value is not finite in this format.
        """
        if self._beside is None:
            return self._write_batch(entries, arrays)
        self._finish_writing()
        self._writing = self._beside.submit(self._write_batch, entries, arrays)

    @contextmanager
    def writing_beside(self):
        """Inside a `with` block, `write` returns at once: a batch is written while the next one is computed.

        What could not be written is raised by the next `write`, or at the end of the block, where all is written.
        """
        with ThreadPoolExecutor(1) as self._beside:
            try:
                yield
                self._finish_writing()
            finally:
                self._beside = self._writing = None

    def _finish_writing(self):
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_batch(self, entries, arrays):
        batch = {f"{name}.{part}": values.cpu() for name in arrays for part, values in arrays[name].items()}

        def write(row):
            entry = entries[row]
            self._write(entry, {name: values[row, : entry.frames].numpy() for name, values in batch.items()})

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, entries))

    def names(self):
        """The names of all entries that are there, whole or damaged."""
        starts = [name for name in _names(self.folder) if name != UNFINISHED]
        paths = {start: os.path.join(self.folder, start) for start in starts}
        return {start + rest.removesuffix(".npz") for start in starts for rest in _names(paths[start])}

    def plan(self, dataset):
        """What storing all that a SpeechDataset may ask for takes.

        Returns:
            the number of windows; how many of them have no entry yet; and the bytes of those.
        """
        missing, names = dataset.window_counts.copy(), self.names()
        if names:  # an empty store need not be searched
            for index, count in enumerate(dataset.window_counts.tolist()):
                missing[index] -= sum(dataset.entry(index, number).name in names for number in range(count))
        frames = frames_from_samples(dataset.sizes, self.conv_layers)
        return int(dataset.window_counts.sum()), int(missing.sum()), int((missing * self.bytes(frames)).sum())

    def bytes(self, frames):
        """Bytes of an entry of so many frames (an int, or an integer array), about."""
        value, scale = BYTES[self.form]
        return OVERHEAD + frames * sum(self._width(name) * value + scale for name in self.arrays)

    def check_space(self, missing_bytes, what):
        """Raise an InputError if the disk has no room for so many more bytes, which `what` takes."""
        free = shutil.disk_usage(self.folder).free
        if missing_bytes > free:
            raise InputError(
                f"task.target_store={self.folder} needs {size_text(missing_bytes)} more for {what}, but the disk"
                f" has {size_text(free)} free; choose a larger one, fewer layers or task.target_format=int8"
            )
        return free

    def _width(self, name):
        return self.conv_layers[-1][0] if name == CNN else self.width

    def _path(self, entry):
        return os.path.join(self.folder, entry.name[:2], f"{entry.name[2:]}.npz")

    def _parts(self, archive, name, frames):
        parts = {part: _array(archive, f"{name}.{part}") for part in PARTS[self.form]}
        if parts["values"].shape != (frames, self._width(name)):
            raise ValueError(f"{name} has the shape {parts['values'].shape}")
        return {part: torch.from_numpy(values) for part, values in parts.items()}

    def _write(self, entry, values):
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InputError(
                    f"the teacher's {_title(name)} for {entry.utterance} is not finite in task.target_format="
                    f"{self.form}; choose int8, or look for what is wrong with the teacher"
                )
        beside = os.path.join(self.folder, UNFINISHED, uuid.uuid4().hex)
        path = self._path(entry)
        try:
            with open(beside, "wb") as file:
                np.savez(file, audio=np.array([entry.digest, entry.source]), **values)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(beside, path)
        except OSError as error:
            if os.path.exists(beside):
                os.remove(beside)
            raise self._failure(error) from None

    def _failure(self, error):
        return InputError(
            f"task.target_store={self.folder} cannot be written ({error.strerror}); what it holds stays good:"
            " make room or choose another folder, and start again"
        )

    def _remove_abandoned(self):
        for file in os.scandir(os.path.join(self.folder, UNFINISHED)):
            with suppress(FileNotFoundError):  # another process has finished it, or removed it
                if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    os.remove(file.path)


class UnusableEntry(Exception):
    """An entry that has to be computed again; the message is one line."""


def waveform_digest(waveform):
    """What tells one piece of audio from another: the SHA-256 of float32 samples [S]."""
    return hashlib.sha256(np.ascontiguousarray(waveform)).hexdigest()


def file_source(path):
    """Size and time of the last change of a file, which change when it does; raises OSError."""
    status = os.stat(path)
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def size_text(count):
    """Bytes for people: 812 MB, 1.4 TB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _supersets(folder, wanted, form):
    """The arrays of those stores in a teacher's folder that hold all that are wanted, in this format."""
    for name in _names(folder):
        arrays, _, ending = name.rpartition(".")
        arrays = [int(array) if array.isdigit() else array for array in arrays.split("+")]
        if ending == form and set(wanted) <= set(arrays):
            yield arrays


def _title(name):
    array = name.split(".")[0]
    return "CNN" if array == CNN else f"layer {array}"


def _names(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _array(archive, name):
    # ZipFile.read checks the sum over the whole; numpy.load would parse a damaged header before.
    return np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
