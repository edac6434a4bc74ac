"""fairseq's manifests, which list the audio files of a split and their lengths.

A manifest is a text file. Its first line is the root folder; every other line is the path of an
audio file below the root and its length in samples, separated by a tab. The id of an utterance is
its path without the suffix.
"""

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_stack.errors import InputError
from fairseq_stack.files import write_whole


@dataclass(frozen=True, eq=False)
class Manifest:
    """The utterances of one split.

    Attributes:
        root: the folder that holds the files.
        paths: the files, relative to the root, as Names.
        samples: int64 [utterances], the length of each file in samples.
    """

    root: str
    paths: Sequence[str]
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Return the path of the file of utterance `index`."""
        return os.path.join(self.root, self.paths[index])

    def utterance(self, index: int) -> str:
        """Return the id of utterance `index`."""
        return utterance_id(self.paths[index])


class Names(Sequence[str]):
    """File names, packed into one piece of memory.

    A million Python strings take three times as much memory. And every data worker would copy them: a worker
    shares the training's memory until it is written, and reading a string writes its reference count.

    Args:
        names: strings, with surrogateescape for names that are not UTF-8.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.text[self.ends[index] : self.ends[index + 1]].decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        ends = self.ends.tolist()
        for start, stop in zip(ends, ends[1:]):
            yield self.text[start:stop].decode(errors="surrogateescape")


def utterance_id(path: str) -> str:
    """Return the id of the utterance in a listed file: its path below the root, without the suffix."""
    return os.path.splitext(path)[0]


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest, but not the listed files: see `missing_files` and `check_manifest` for these.

    A manifest may have a byte order mark, any kind of line ends and blank lines at the end. Names that are
    absolute or contain "./", ".." or "//" become plain paths below the root.

    Raises:
        InputError: the manifest or its root is missing, it lists nothing, or a line is malformed
            or repeats an utterance.
    """
    root, *lines = _lines(path)
    if not os.path.isdir(root):
        root = root.strip()
    if not os.path.isdir(root):
        raise InputError(f"{path}:1: the root folder {root!r} does not exist; correct it or prepare again")
    if not lines:
        raise InputError(f"{path}: lists no files after its first line; prepare the speech again")

    paths, samples, seen = [], np.empty(len(lines), dtype=np.int64), set()
    for number, line in enumerate(lines):
        listed, tab, count = line.partition("\t")
        count = count.strip()
        name = _below(root, listed)
        problem = None
        if not listed or not tab:
            problem = f"{line!r} is not a path, a tab and a number of samples"
        # Eighteen digits still fit an int64.
        elif not (count.isascii() and count.isdigit() and len(count) <= 18 and int(count) > 0):
            problem = f"{count!r} is not a positive whole number of samples"
        elif name is None:
            problem = f"{listed!r} does not lie below the root folder {root!r}"
        elif (utterance := utterance_id(name)) in seen:
            line = 2 + [utterance_id(each) for each in paths].index(utterance)
            problem = f"the utterance {utterance!r} is listed before, in line {line}"
        if problem:
            raise InputError(f"{path}:{number + 2}: {problem}; correct the line or prepare again")
        seen.add(utterance)
        paths.append(name)
        samples[number] = int(count)
    return Manifest(root=root, paths=Names(paths), samples=samples)


def read_manifests(paths: Sequence[str | Path]) -> Manifest:
    """Read several manifests as one, whose root is the common folder of their roots.

    Raises:
        InputError: as read_manifest, or two of them list the same utterance.
    """
    manifests = [read_manifest(path) for path in paths]
    if len(manifests) == 1:
        return manifests[0]
    root = os.path.commonpath([os.path.abspath(manifest.root) for manifest in manifests])
    names: list[str] = []
    listed: dict[str, str | Path] = {}  # the manifest of each utterance
    for path, manifest in zip(paths, manifests):
        folder = os.path.relpath(manifest.root, root)
        for name in manifest.paths:
            name = name if folder == "." else f"{folder}/{name}"
            utterance = utterance_id(name)
            if listed.setdefault(utterance, path) != path:
                raise InputError(
                    f"{path}: the utterance {utterance!r} is listed in {listed[utterance]} too; take it out of one"
                )
            names.append(name)
    return Manifest(root, Names(names), np.concatenate([manifest.samples for manifest in manifests]))


def _lines(path: str | Path) -> list[str]:
    """Return the lines of a text file, without blank lines at its end."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InputError(
            f"{path}: cannot read this manifest ({error.strerror}); make one with fairseq-stack prepare"
        ) from error
    # File names need not be UTF-8; surrogateescape keeps their bytes.
    encoding, errors = "utf-8-sig", "surrogateescape"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # from a redirection in Windows' shell
        encoding, errors = "utf-16", "replace"
    text = content.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")
    if not text or "\0" in text:
        problem = "is not a text file" if text else "is empty"
        raise InputError(f"{path}: {problem}; make a manifest with fairseq-stack prepare")
    lines = text.split("\n")
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines


def _below(root: str, name: str) -> str | None:
    """Return a listed name as a plain path below the root; None if it is not below the root."""
    if not (name.startswith(("/", "./", "../")) or "//" in name or "/." in name):
        return name  # quickly, because there can be millions of plain names
    if not os.path.isabs(name):
        names = [os.path.normpath(name)]
    else:  # the root may be a link to the folder of the files
        names = (os.path.relpath(name, folder) for folder in (root, os.path.realpath(root)))
    return next((name for name in names if name != ".." and not name.startswith("../")), None)


def missing_files(manifest: Manifest) -> list[str]:
    """Return the listed paths that do not exist, in the manifest's order.

    The function lists every folder once, because a request for each file would take minutes on a network disk.
    """
    folders: dict[str, set[str]] = {}
    missing = []
    for path in manifest.paths:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            try:
                with os.scandir(os.path.join(manifest.root, folder)) as entries:
                    folders[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                folders[folder] = set()
        if name not in folders[folder]:
            missing.append(path)
    return missing


def write_manifest(path: str | Path, root: str | Path, entries: Iterable[tuple[str, int]]) -> None:
    """Write a manifest of `entries`, pairs (path below the root, samples), in their order.

    Raises:
        InputError: there are no entries, or a name holds a tab or a line break.
    """
    lines = [os.path.abspath(root)]
    check_name(lines[0])
    for name, samples in entries:
        check_name(name)
        lines.append(f"{name}\t{samples}")
    if len(lines) == 1:
        raise InputError(f"{path}: there is no audio to list")
    write_lines(path, lines)


def check_name(name: str) -> None:
    """Raise an InputError if a path holds a tab or a line break, which end a field or a line of a manifest."""
    if any(mark in name for mark in "\t\n\r"):
        raise InputError(f"{name!r}: a manifest cannot list names with tabs or line breaks; rename the file")


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, "".join(f"{line}\n" for line in lines))


def check_manifest(path: str | Path, shortest: int = 1) -> list[str]:
    """Read every listed file to its end and return the problems, one line each.

    Args:
        path: of the manifest.
        shortest: samples of the shortest recording that can be used.

    Raises:
        InputError: the manifest itself cannot be read.
    """
    from fairseq_stack.data.audio import count_samples  # not at the top: to read a manifest takes no libsndfile
    from fairseq_stack.data.bad_audio import too_short

    manifest = read_manifest(path)

    def problem(index: int) -> str | None:
        try:
            samples = count_samples(manifest.path(index))
        except InputError as error:
            return str(error)
        if samples != manifest.samples[index]:
            return f"{manifest.path(index)}: has {samples} samples, {path} says {manifest.samples[index]}"
        return too_short(manifest.path(index), samples, shortest)

    # Threads suffice, because libsndfile decodes without Python's global lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = pool.map(problem, range(len(manifest)))
        bar = tqdm(checks, total=len(manifest), desc=os.path.basename(path), unit=" files", mininterval=1)
        return [line for line in bar if line]
