"""A teacher that a file describes. It is loaded when it is needed, which may be never."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fairseq_stack.errors import InputError
from fairseq_stack.files import written_beside
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.base import CnnTeacher, Teacher

DESCRIPTION = "teacher.json"
FIELDS = ("family", "depth", "width", "normalize", "epsilon", "conv_layers", "longest")
VERSION = 1  # of how targets are computed and stored; another number starts a new store
BLOCK = 1 << 20  # bytes


class DescribedTeacher(Teacher):
    """A Teacher whose weights stay on disk until they are needed.

    Args:
        path: the teacher's file or folder.
        options: for load_teacher.
        fields: the values of FIELDS.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        self.name = str(path)
        self.options = options
        self.family, self.depth, self.width = fields["family"], fields["depth"], fields["width"]
        self.normalize, self.epsilon, self.longest = fields["normalize"], fields["epsilon"], fields["longest"]
        self.conv_layers = [tuple(layer) for layer in fields["conv_layers"]]

    @cached_property
    def loaded(self) -> Teacher:
        """The Teacher itself."""
        return load_teacher(self.name, **self.options)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    def cnn_features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """See CnnTeacher; for teachers that are one."""
        return cast(CnnTeacher, self.loaded).cnn_features(waveforms, lengths)

    def hidden_states(
        self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int], *features: Tensor
    ) -> dict[int, Tensor]:
        return self.loaded.hidden_states(waveforms, lengths, layers, *features)

    def frames(self, samples: int) -> int:
        if self.longest is not None and samples > self.longest:
            return self.loaded.frames(samples)  # raises the error
        return frames_from_samples(samples, self.conv_layers)


def described_teacher(path: str | Path, store: str | Path, **options: Any) -> tuple[DescribedTeacher, Path]:
    """Return a teacher, loaded only if the store does not describe it yet, and the store's folder for it.

    Args:
        path: file or folder of the teacher.
        store: task.target_store; made if missing.
        options: for load_teacher; the folder's name depends on them, too.

    Raises:
        InputError: the teacher or the store cannot be used.
    """
    folder = Path(store) / fingerprint(path, **options)[:16]
    try:
        fields = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if fields.pop("sum") == _sum(fields):
            return DescribedTeacher(path, options, fields), folder
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # none yet, or a damaged one
    teacher = load_teacher(path, **options)
    fields = {name: getattr(teacher, name) for name in FIELDS}
    fields = json.loads(json.dumps({**fields, "name": str(path)}))
    # Every process of a job writes this file.
    with written_beside(folder / DESCRIPTION, f"task.target_store={store}", suffix=f".{os.getpid()}") as beside:
        beside.write_text(json.dumps({**fields, "sum": _sum(fields)}, indent=2), encoding="utf-8")
    described = DescribedTeacher(path, options, fields)
    described.loaded = teacher
    return described, folder


def fingerprint(path: str | Path, **options: Any) -> str:
    """Return the SHA-256 of the teacher's files and options, in hex.

    Raises:
        InputError: a file cannot be read.
    """
    path = Path(path)
    # A teacher is loaded from these files alone.
    files = sorted([*path.glob("*.json"), *_weights(path)]) if path.is_dir() else [path]
    return _digest(path, files, [VERSION, options])


def weights_digest(path: str | Path) -> str:
    """Return the SHA-256 of the files that hold a teacher's weights, in hex; it does not depend on their folder.

    Raises:
        InputError: a file cannot be read.
    """
    path = Path(path)
    return _digest(path, sorted(_weights(path)) if path.is_dir() else [path])


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]


def _digest(path: Path, files: Iterable[Path], options: Any = None) -> str:
    whole = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for each in files:
        try:
            digest = _digest_of_file(each, each.stat().st_mtime_ns)
        except OSError as error:
            raise InputError(f"task.teacher={path}: {each.name} cannot be read ({error.strerror})") from None
        whole.update(f"{each.name if path.is_dir() else ''}\0{digest}".encode())
    return whole.hexdigest()


@cache
def _digest_of_file(path: Path, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
