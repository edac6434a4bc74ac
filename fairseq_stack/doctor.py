"""Examine an installation, prepared speech and a teacher before a training, and say what to fix."""

import importlib
import io
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# The versions that the tests pass with, for each Python; as in constraints.txt and constraints-3.10.txt.
_LATEST = {
    "torch": "2.14.1",
    "torchaudio": "2.11.0",
    "ve-fairseq": "0.12.3",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3.1",
    "numpy": "2.4.6",
    "transformers": "5.18.0",
    "soundfile": "0.14.0",
}
TESTED = {
    "3.10": {
        "torch": "2.4.1",
        "torchaudio": "2.4.1",
        "fairseq": "0.12.2",
        "hydra-core": "1.0.7",
        "omegaconf": "2.0.6",
        "numpy": "1.26.4",
        "transformers": "4.57.6",
        "soundfile": "0.14.0",
    },
    "3.11": _LATEST,
    "3.12": _LATEST,
}
_MODULES = {"hydra-core": "hydra", "ve-fairseq": "fairseq"}  # other modules have the name of their package
FAIRSEQS = ("fairseq", "ve-fairseq")


class Finding(NamedTuple):
    """One line of the doctor's output.

    Attributes:
        what: the thing examined.
        verdict: "ok"; "note", if it may be fine; or "fix".
        text: the result, and what to do.
    """

    what: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.what}: {self.text}"


def examine(data: str | None = None, teacher: str | None = None) -> Iterator[Finding]:
    """Yield a Finding for each thing examined. Things that others need come first.

    Args:
        data: folder of manifests, or None.
        teacher: path of a teacher, or None.
    """
    # fairseq and hydra warn while they are imported, but not about the installation.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    yield examine_python()
    fit = True
    for finding in examine_packages():
        fit = fit and finding.verdict != "fix"
        yield finding
    if fit:
        yield examine_gpu()
        yield examine_libsndfile()
    for name, path, examiner in (("data", data, examine_speech), ("teacher", teacher, examine_teacher)):
        if path is not None and fit:
            yield from examiner(path)
        elif path is not None:
            yield Finding(name, "note", "not examined; first fix the installation")


def examine_python() -> Finding:
    """Whether this Python is tested."""
    version = ".".join(map(str, sys.version_info[:2]))
    found = f"{platform.python_version()} ({sys.executable})"
    if version in TESTED:
        return Finding("Python", "ok", found)
    return Finding("Python", "note", f"{found} is not tested; {', '.join(TESTED)} are")


def examine_packages() -> Iterator[Finding]:
    """One Finding for each package that training needs: whether it is installed, imports and has a tested version."""
    version = ".".join(map(str, sys.version_info[:2]))
    tested = TESTED.get(version, TESTED["3.10"] if sys.version_info < (3, 11) else _LATEST)
    constraints = "constraints-3.10.txt" if tested is TESTED["3.10"] else "constraints.txt"
    install = f"pip install -c {constraints} -e .[train]"
    yield _this_package(install)
    installed = [name for name in FAIRSEQS if _version(name)]
    wanted = next(name for name in FAIRSEQS if name in tested)
    for name, pinned in tested.items():
        if name in FAIRSEQS and len(installed) == 2:
            yield Finding("fairseq", "fix", f"both {' and '.join(installed)} are installed, in one folder;"
                          f" pip uninstall -y {' '.join(installed)}, then {install}")  # fmt: skip
            continue
        name = installed[0] if name in FAIRSEQS and installed else name
        found = _version(name)
        if found is None:
            yield Finding(name, "fix", f"is not installed; {install}")
            continue
        try:
            importlib.import_module(_MODULES.get(name, name))
        except Exception as error:  # a broken package can raise anything
            reason = " ".join(str(error).split())[:200]
            yield Finding(name, "fix", f"{found} cannot be imported ({type(error).__name__}: {reason}); {install}")
            continue
        if name in FAIRSEQS and name != wanted:
            yield Finding(name, "note", f"{found}; with Python {version} {wanted} {pinned} is tested")
        elif found.split("+")[0] == pinned:
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "note", f"{found}; {pinned} is tested ({install})")


def _this_package(install: str) -> Finding:
    found, command = _version("fairseq_stack"), shutil.which("fairseq-hydra-train")
    if found is None:
        return Finding("fairseq_stack", "note", f"is imported from a folder and not installed; {install}")
    if command is None:
        return Finding(
            "fairseq_stack", "note", f"{found}; fairseq-hydra-train is not on the PATH: activate its environment"
        )
    return Finding("fairseq_stack", "ok", f"{found}, trains with {command}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def examine_gpu() -> Finding:
    """The GPUs that torch sees, and the precision to train in."""
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return Finding("GPU", "note", f"torch can use none ({built}); training on the CPU needs common.fp16=false")
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = "; ".join(f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices)
    # bf16 arithmetic needs compute capability 8, fast fp16 needs 7.
    oldest = min((device.major, device.minor) for device in devices)
    if oldest >= (8, 0):
        precision = "common.bf16=true or common.fp16=true"
    else:
        precision = "common.fp16=true" if oldest >= (7, 0) else "fp32 (fp16 saves memory only)"
    return Finding("GPU", "ok", f"{names}; train in {precision}")


def examine_libsndfile() -> Finding:
    """Whether libsndfile reads FLAC, the format of the prepared speech."""
    import numpy as np
    import soundfile

    try:
        file = io.BytesIO()
        soundfile.write(file, np.zeros(160, dtype=np.float32), 16_000, format="FLAC")
        file.seek(0)
        soundfile.read(file)
    except (RuntimeError, OSError) as error:
        return Finding(
            "libsndfile", "fix", f"cannot read and write FLAC ({error}); pip install --force-reinstall soundfile"
        )
    return Finding("libsndfile", "ok", f"{soundfile.__libsndfile_version__}, reads FLAC")


def examine_speech(folder: str | Path) -> Iterator[Finding]:
    """One Finding for each manifest: whether it is well-formed and how many of its recordings are usable.

    Only the first, the shortest and the longest recordings are read; fairseq-stack prepare --check reads all.
    """
    from fairseq_stack.errors import InputError

    folder = Path(folder)
    defaults = {"train.tsv": "dataset.train_subset", "valid.tsv": "dataset.valid_subset"}
    found = [path.name for path in sorted(folder.glob("*.tsv")) if path.name in defaults or _is_manifest(path)]
    named = [name for name in found if name not in (*defaults, "test.tsv")]
    for name, field in defaults.items():
        if name not in found and named:
            other = named[0].removesuffix(".tsv")
            yield Finding(name, "note", f"does not exist; name another with {field}, such as {other}")
    wanted = [name for name in defaults if name in found or not named]
    for name in dict.fromkeys([*wanted, *found]):
        try:
            yield _examine_manifest(folder / name)
        except InputError as error:
            yield Finding(name, "fix", str(error))


def _is_manifest(path: Path) -> bool:
    """Whether a TSV file can be a manifest: its first line, the root folder, has no tab, unlike that of a table."""
    try:
        with open(path, "rb") as file:
            return b"\t" not in file.readline()
    except OSError:
        return True  # reading the manifest gives a full error message


def _examine_manifest(path: Path) -> Finding:
    """The Finding on a manifest that training can use.

    Raises:
        InputError: training cannot use the manifest.
    """
    import numpy as np

    from fairseq_stack.data.audio import SAMPLE_RATE, SHORTEST, read_audio
    from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT, BadAudio, listed_problems
    from fairseq_stack.data.manifest import read_manifest
    from fairseq_stack.errors import InputError

    manifest = read_manifest(path)
    bad_audio = BadAudio(str(path), len(manifest), "skip", BAD_AUDIO_LIMIT)
    problems = listed_problems(manifest, SHORTEST)
    bad_audio.report(problems)
    usable = np.flatnonzero([name not in problems for name in manifest.paths])
    lengths = manifest.samples[usable]
    for index in {int(usable[0]), int(usable[lengths.argmin()]), int(usable[lengths.argmax()])}:
        try:
            read_audio(manifest.path(index), 0, int(manifest.samples[index]))
        except InputError as error:
            problems[manifest.paths[index]] = str(error)
    bad_audio.report(problems)
    seconds = lengths / SAMPLE_RATE
    found = (
        f"{len(manifest) - len(problems):,} recordings of {seconds.min():.1f} to {seconds.max():.1f} s,"
        f" {seconds.sum() / 3600:.2f} h"
    )
    if problems:
        first = next(iter(problems.values()))
        return Finding(path.name, "note", f"{found}; training skips {len(problems)} others, first {first}")
    return Finding(path.name, "ok", found)


def examine_teacher(path: str | Path) -> Iterator[Finding]:
    """One Finding: whether the teacher loads and computes finite numbers, and its shape."""
    import torch

    from fairseq_stack.data.audio import SAMPLE_RATE
    from fairseq_stack.errors import InputError
    from fairseq_stack.models.conv_geometry import samples_per_frame
    from fairseq_stack.teachers import load_teacher

    try:
        teacher = load_teacher(path)
        second = torch.randn(1, SAMPLE_RATE), torch.tensor([SAMPLE_RATE])
        states = teacher.hidden_states(*second, [teacher.depth])[teacher.depth]
        if not bool(torch.isfinite(states).all()):
            raise InputError(f"task.teacher={path} computes numbers that are not finite; download or copy it again")
    except InputError as error:
        yield Finding("teacher", "fix", str(error))
        return
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters()) / 1e6
    takes = {True: "normalised waveforms", False: "waveforms as they are", None: "log-mel"}[teacher.normalize]
    rate = SAMPLE_RATE / samples_per_frame(teacher.conv_layers)
    yield Finding(
        "teacher", "ok", f"{path}: {teacher.family}, {teacher.depth} layers x {teacher.width}, {parameters:.4g} M"
        f" parameters, takes {takes}, {rate:g} frames a second",
    )  # fmt: skip
