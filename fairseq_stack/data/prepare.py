"""Speech preparation: converts audio of any kind to 16 kHz mono files, and writes manifests and labels.

The output folder holds `train.tsv`, `valid.tsv` and `test.tsv` (see manifest.py), `labels.tsv` with
the columns LABELS (empty where unknown), `phones.tsv` with the columns PHONES if phones are known, and the converted
recordings in `audio/`.
"""

import hashlib
import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE, SHORTEST, any_audio
from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT, BadAudio, too_short
from fairseq_stack.data.debian import SOURCES, unpacked_recordings
from fairseq_stack.data.manifest import (
    check_manifest,
    check_name,
    read_manifest,
    utterance_id,
    write_lines,
    write_manifest,
)
from fairseq_stack.data.recordings import LABELS, PHONES, Recording, files_below
from fairseq_stack.data.resample import resample
from fairseq_stack.data.splits import SPLITS, choose_splits
from fairseq_stack.errors import InputError
from fairseq_stack.files import CannotWrite, written_beside

logger = logging.getLogger(__name__)

# Suffixes of files that libsndfile opens: its own names of the formats, and other usual suffixes.
SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW") | frozenset(
    ".aif .aifc .aff .wave .bwf .oga .opus .mp1 .mp2 .mpga .snd .sph .sf .8svx .iff .mat .gsm".split()
)
# Suffixes of audio that libsndfile does not open.
_OTHER_AUDIO = frozenset(
    ".m4a .m4b .aac .mp4 .mov .wma .webm .mka .mkv .avi .amr .awb .3gp .ac3 .ape .wv .tta .spx .shn .dss .ra .mid"
    " .raw .pcm .vox .ul .al .ulaw .alaw .g722 .g729 .adpcm .lpc .sil".split()
)
_OFTEN_DATA = frozenset((".mat", ".mat4", ".mat5", ".htk", ".iff", ".xi", ".sds", ".sf"))  # but sometimes audio
QUIET = 2**-8  # of full scale: with a lower peak, 16 bits hold less than 8 of the waveform

LIBRISPEECH = {"train": "train-*", "valid": "dev-*", "test": "test-*"}


def prepare(
    source: str | Path,
    output: str | Path,
    grouping: str = "prompt",
    bad_audio_limit: float = BAD_AUDIO_LIMIT,
    texts: str | Path | None = None,
) -> None:
    """Prepare speech in the folder `output`.

    After an interruption, call it again: it reuses fetched packages and converted audio. It writes the
    manifests last.

    Args:
        source: a folder of audio, or a name in SOURCES for Debian's recordings.
        output: the folder to write.
        grouping: no prompt ("prompt") or no speaker ("speaker") is in two splits (see choose_splits).
        bad_audio_limit: the share of recordings that may be unusable; they are logged and left out.
        texts: for a folder of audio, a file of what is said, see read_texts.

    Raises:
        InputError: the source is missing or has no audio, more recordings than the limit are unusable, there
            are too few prompts for three splits, or a package cannot be fetched.
    """
    output = Path(os.path.abspath(output))
    if source in SOURCES:
        if texts:
            raise InputError(f"--texts {texts}: {source} has its own texts; leave the option out")
        with unpacked_recordings(SOURCES[str(source)], output / "packages") as recordings:
            if grouping == "speaker":
                recordings = _with_speaker(recordings)
            prepare_recordings(recordings, output, grouping, bad_audio_limit)
        return
    source = Path(os.path.abspath(source))
    if not source.is_dir():
        raise InputError(f"--source {source}: is not a folder; give a folder of audio, or {' or '.join(SOURCES)}")
    if any((source / "LibriSpeech").glob("train-*")):
        source = source / "LibriSpeech"
    if any(source.glob("train-*/*/*/*.flac")):
        if texts:
            raise InputError(f"--texts {texts}: LibriSpeech has its own texts; leave the option out")
        prepare_librispeech(source, output, bad_audio_limit)
        return
    recordings = folder_recordings(source, output)
    if texts:
        recordings = with_texts(recordings, texts)
    if grouping == "speaker":
        recordings = [_named_after_folder(recording) for recording in recordings]
    prepare_recordings(recordings, output, grouping, bad_audio_limit)


# Other sources


def folder_recordings(source: Path, output: Path) -> list[Recording]:
    """Return the audio files below `source`, except those in `output`; log the number of other files, and why."""
    if source == output or output / "audio" in (source, *source.parents):
        raise InputError(f"--output {output}: would mix with the audio of --source; choose another folder")
    recordings, aside = [], defaultdict(Counter)  # aside: {reason: {suffix: number of files}}
    for path in files_below(source):
        if output in path.parents:
            continue
        reason = _reason_to_leave(path)
        if reason:
            aside[reason][path.suffix.lower() or "without suffix"] += 1
        else:
            recordings.append(Recording(path, utterance_id(path.relative_to(source).as_posix())))
    left = []
    for reason, counts in sorted(aside.items()):
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(10))
        left.append(f"{sum(counts.values())} files left aside: {reason} ({kinds})")
    if not recordings:
        raise InputError("; ".join([f"--source {source}: has no audio that can be read, nor its subfolders", *left]))
    for line in left:
        logger.warning(line)
    return recordings


def with_texts(recordings: Sequence[Recording], texts: str | Path) -> list[Recording]:
    """Return the recordings with what is said in them; log how many have no text.

    Args:
        recordings: of a folder.
        texts: a text file with a line for each recording: its path below the folder, with or without the suffix, a
            tab, and the text.

    Raises:
        InputError: the file cannot be read, a line has no tab, or no line names a recording.
    """
    said = {}
    try:
        lines = Path(texts).read_text(encoding="utf-8-sig").split("\n")  # spreadsheets write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--texts {texts}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        name, tab, text = line.partition("\t")
        if not tab and line.strip():
            raise InputError(f"--texts {texts}:{number}: has no tab between the path of a recording and its text")
        said[name] = " ".join(text.split())
    found = [
        replace(one, text=said.get(one.utterance) or said.get(f"{one.utterance}{one.source.suffix}", ""))
        for one in recordings
    ]
    without = sum(not one.text for one in found)
    if without == len(found):
        raise InputError(
            f"--texts {texts}: names no recording; write paths below --source, such as {recordings[0].utterance}"
        )
    if without:
        logger.warning(f"{without} recordings have no text in {texts}")
    return found


def _reason_to_leave(path: Path) -> str | None:
    """Return why a file is no recording; None if it is one."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return "their names begin with a dot"
    if suffix in _OTHER_AUDIO:
        return "audio of a kind that cannot be read here; convert it to FLAC, such as with ffmpeg"
    if suffix not in SUFFIXES:
        return "no audio by their suffix"
    if suffix in _OFTEN_DATA:
        try:
            soundfile.info(os.fsencode(path))  # pyright: ignore[reportArgumentType] soundfile takes bytes, too
        except soundfile.SoundFileError:
            return "no audio in them"
    return None


def _with_speaker(recordings: list[Recording]) -> list[Recording]:
    """Return the recordings whose speaker is known; log the number of others."""
    known = [recording for recording in recordings if recording.speaker]
    if len(known) < len(recordings):
        logger.warning(f"{len(recordings) - len(known)} recordings left aside: their speakers are not known")
    return known


def _named_after_folder(recording: Recording) -> Recording:
    """Return the recording with its first folder below the source as the speaker."""
    folder, slash, _ = recording.utterance.partition("/")
    return replace(recording, speaker=folder if slash else "")


def prepare_librispeech(source: Path, output: Path, bad_audio_limit: float) -> None:
    """Write manifests and labels of LibriSpeech; its FLAC files and splits stay as they are."""
    recordings, split = [], {}
    for name, folders in LIBRISPEECH.items():
        chapters = sorted(source.glob(f"{folders}/*/*"))
        for chapter in tqdm(chapters, desc=folders, unit=" chapters", mininterval=1):
            texts = {}
            for document in chapter.glob("[!.]*.trans.txt"):
                lines = document.read_text(encoding="utf-8").splitlines()
                pairs = (line.partition(" ") for line in lines)
                texts.update((name, text) for name, space, text in pairs if space)
            for path in sorted(chapter.glob("[!.]*.flac")):
                utterance = utterance_id(path.relative_to(source).as_posix())
                speaker = chapter.parent.name
                recordings.append(Recording(path, utterance, speaker, "en", texts.get(path.stem, "")))
                split[utterance] = name
    if "valid" not in split.values():
        raise InputError(f"--source {source}: has no dev-* folder to validate on; add dev-clean")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = _finished(pool.map(_librispeech_length, recordings), recordings, "reading")
    _check_bad_audio(results, recordings, bad_audio_limit)
    _write(output, source, recordings, split, results)


def _librispeech_length(recording: Recording) -> "Result":
    """Return the Result of a file that needs no conversion."""
    try:
        info = soundfile.info(recording.source)
    except soundfile.SoundFileError:
        return Result(problem=f"{recording.source}: cannot be read as audio; unpack it again")
    if (info.samplerate, info.channels) != (SAMPLE_RATE, 1):
        return Result(
            problem=(
                f"{recording.source}: has {info.samplerate} Hz and {info.channels} channel(s) instead of"
                f" {SAMPLE_RATE} Hz mono speech; unpack it again"
            )
        )
    return Result(info.frames, problem=too_short(recording.source, info.frames, SHORTEST))


# Conversion


class Result(NamedTuple):
    """The result of preparing one recording.

    Attributes:
        samples: number of samples of the audio to train on.
        problem: a line that names the file and says why it cannot be used; None if it can be.
        peak: of the waveform, if this run converted it; full scale is 1.
        digest: hash of the samples.
    """

    samples: int = 0
    problem: str | None = None
    peak: float = 0.0
    digest: bytes = b""


def prepare_recordings(
    recordings: Sequence[Recording],
    output: Path,
    grouping: str = "prompt",
    bad_audio_limit: float = BAD_AUDIO_LIMIT,
) -> None:
    """Convert recordings to FLAC in output/audio, split them, and write manifests and labels."""
    counts = Counter(recording.utterance for recording in recordings)
    several = [utterance for utterance, count in counts.items() if count > 1]
    if several:
        raise InputError(
            f"--source has {counts[several[0]]} files named {several[0]} of different suffix"
            + (f", and {len(several) - 1} more such names" if several[1:] else "")
            + "; keep one of each"
        )
    copies = find_copies(recordings)
    choose_splits(recordings, copies, grouping)  # raises the error of too few groups before the long work

    audio = output / "audio"
    results = _convert_all([recording for recording in recordings if recording.utterance not in copies], audio)
    # A file with the same bytes as an unusable file is also unusable, and must be reported too.
    lost = [
        recording
        for recording in recordings
        if copies.get(recording.utterance) in results and results[copies[recording.utterance]].problem
    ]
    results.update(_convert_all(lost, audio))
    loud = {utterance: result.peak for utterance, result in results.items() if result.peak > 1}
    if loud:
        loudest = max(loud, key=loud.__getitem__)
        logger.warning(
            f"{len(loud)} recordings overshoot full scale and were scaled down; the loudest is"
            f" {loudest} with a peak of {loud[loudest]:.3f}"
        )
    _check_bad_audio(results, recordings, bad_audio_limit)
    if copies:
        logger.warning(f"{len(copies)} files left aside: the same as another (such as {next(iter(copies))})")

    good = [recording for recording in recordings if not results.get(recording.utterance, Result()).problem]
    first: dict[bytes, str] = {}  # {digest: the first utterance with these samples}, in any format
    same = {
        utterance: first.setdefault(result.digest, utterance)
        for utterance, result in results.items()
        if not result.problem
    }
    split = choose_splits(good, {**same, **copies}, grouping)
    _write(output, audio, [recording for recording in good if recording.utterance not in copies], split, results)


def find_copies(recordings: Iterable[Recording]) -> dict[str, str]:
    """Return {utterance: earlier utterance whose file has the same bytes}."""
    by_size = defaultdict(list)
    for recording in recordings:
        if os.access(recording.source, os.R_OK):  # the conversion reports what is missing
            by_size[recording.source.stat().st_size].append(recording)
    copies = {}
    for same_size in by_size.values():
        first: dict[bytes, str] = {}
        for recording in same_size if len(same_size) > 1 else ():
            original = first.setdefault(_digest(recording.source), recording.utterance)
            if original != recording.utterance:
                copies[recording.utterance] = original
    return copies


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.digest()


def _convert_all(recordings: Sequence[Recording], audio: Path) -> dict[str, Result]:
    """Convert recordings to FLAC in the folder `audio` on all cores; return {utterance: Result}."""
    jobs = [(recording.source, audio / f"{recording.utterance}.flac") for recording in recordings]
    for folder in {target.parent for _, target in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    if not jobs:
        return {}
    # Workers are forked from a server process that imports everything once and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(mp_context=context)
    try:
        return _finished(pool.map(_convert, jobs, chunksize=16), recordings, "converting")
    finally:
        pool.shutdown(cancel_futures=True)  # so that an interrupt does not wait for the rest


def _convert(job: tuple[Path, Path]) -> Result:
    """Convert (source, target), unless an earlier run has done so; return a Result.

    Raises:
        CannotWrite: the target cannot be written.
    """
    source, target = job
    try:
        check_name(str(source))
        status = os.stat(source)
    except InputError as error:
        return Result(problem=str(error))
    except OSError as error:
        return Result(problem=f"{source}: cannot be read ({error.strerror}); replace or remove it")
    version = f"source: {status.st_size} bytes, modified {status.st_mtime_ns} ns, unclipped"
    samples, peak = _converted_before(target, version), 0.0
    if samples is None:
        try:
            with written_beside(target) as beside:
                samples, peak = _write_flac(source, beside, version)
                # 16 bits would clip samples above full scale, and would lose much of a very quiet waveform.
                if peak > 1:
                    _write_flac(source, beside, version, gain=1 / peak)
                elif 0 < peak < QUIET:
                    _write_flac(source, beside, version, subtype="PCM_24")
        except CannotWrite:
            raise
        except InputError as error:  # of the source
            return Result(problem=str(error))
    with open(target, "rb") as file:
        digest = file.read(42)[26:]  # the MD5 of the samples, which FLAC keeps in its header
    return Result(samples, too_short(source, samples, SHORTEST), peak, digest)


def _converted_before(target: Path, version: str) -> int | None:
    """Return the number of samples of a converted file; None if it is missing or its source has changed."""
    with suppress(soundfile.LibsndfileError, OSError):
        name = os.fsencode(target)
        with soundfile.SoundFile(name) as file:  # pyright: ignore[reportArgumentType] soundfile takes bytes, too
            if file.comment == version:
                return file.frames
    return None


def _write_flac(
    source: Path, target: Path, comment: str, gain: float = 1.0, subtype: str = "PCM_16"
) -> tuple[int, float]:
    """Write any audio as 16 kHz mono FLAC; return the number of samples, and the peak without the gain.

    FLAC has checksums, so that later damage is noticed.
    """
    samples, peak = 0, 0.0
    rate, blocks = any_audio(source)
    with _Output(target, "w+") as output:
        with soundfile.SoundFile(output, "w", SAMPLE_RATE, channels=1, format="FLAC", subtype=subtype) as file:
            file.comment = comment
            for block in resample(blocks, rate, SAMPLE_RATE):
                samples += len(block)
                peak = max(peak, float(np.abs(block).max(initial=0)))
                file.write(block * np.float32(gain))
        if output.failure:
            raise output.failure
    return samples, peak


class _Output(io.FileIO):
    """A file that keeps the OSError of a failed write, such as on a full disk, which libsndfile does not report."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return len(data)


def _finished(results: Iterator[Result], recordings: Sequence[Recording], doing: str) -> dict[str, Result]:
    """Return {utterance: Result}, from the results in the order of the recordings, with a progress bar."""
    bar = tqdm(results, total=len(recordings), desc=doing, unit=" files", mininterval=1)
    # zip asks the bar first, so that the bar gets to its end.
    return {recording.utterance: result for result, recording in zip(bar, recordings)}


def _check_bad_audio(results: Mapping[str, Result], recordings: Sequence[Recording], limit: float) -> None:
    """Log each recording that cannot be used; raise an InputError if there are too many."""
    problems = {utterance: result.problem for utterance, result in results.items() if result.problem}
    try:
        BadAudio("--source", len(recordings), "skip", limit, "--bad-audio-limit").report(problems)
    except InputError as error:
        raise InputError(f"{error}; no manifest was written") from None


# Results


def _write(
    output: Path, root: Path, recordings: Sequence[Recording], split: Mapping[str, str], results: Mapping[str, Result]
) -> None:
    """Write the labels, then the manifests of FLAC files below `root`, train.tsv last."""
    output.mkdir(parents=True, exist_ok=True)
    recordings = [recording for recording in recordings if not results[recording.utterance].problem]
    _write_columns(output / "labels.tsv", LABELS, recordings)
    phones = [recording for recording in recordings if recording.phones]
    if phones:
        _write_columns(output / "phones.tsv", PHONES, phones)
    else:
        (output / "phones.tsv").unlink(missing_ok=True)
    for name in reversed(SPLITS):
        chosen = [recording.utterance for recording in recordings if split[recording.utterance] == name]
        entries = [(f"{utterance}.flac", results[utterance].samples) for utterance in chosen]
        if entries:
            write_manifest(output / f"{name}.tsv", root, entries)
        else:  # LibriSpeech without its test folders
            (output / f"{name}.tsv").unlink(missing_ok=True)


def _write_columns(path: Path, columns: Sequence[str], recordings: Iterable[Recording]) -> None:
    """Write a table with a header and, for each recording, its fields `columns`."""
    rows = (tuple(getattr(recording, column) for column in columns) for recording in recordings)
    write_lines(path, map("\t".join, (columns, *rows)))


def _manifests(output: str | Path) -> list[Path]:
    """Return the paths of the manifests in `output`; only test.tsv may be missing."""
    paths = [Path(output, f"{name}.tsv") for name in SPLITS]
    return [path for path in paths if path.exists() or path.stem != "test"]


def check_speech(output: str | Path) -> list[str]:
    """Return the problems of the files in the manifests of `output`, one line each."""
    return [problem for path in _manifests(output) for problem in check_manifest(path, SHORTEST)]


def summary(output: str | Path) -> str:
    """Return one line with the files and hours of every split."""
    parts = []
    for path in _manifests(output):
        manifest = read_manifest(path)
        hours = manifest.samples.sum() / SAMPLE_RATE / 3600
        parts.append(f"{path.stem} {len(manifest):,} files, {hours:.2f} h")
    return f"{output}: {'; '.join(parts)}"
