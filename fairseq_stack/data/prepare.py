"""Speech preparation: audio of any kind becomes 16 kHz mono files, manifests and labels.

The output folder holds `train.tsv`, `valid.tsv` and `test.tsv` (see manifest.py), `labels.tsv` with
the columns LABELS (empty where unknown), and in `audio/` what had to be converted.
"""

import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE, SHORTEST, any_audio
from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT, BadAudio, too_short
from fairseq_stack.data.manifest import (
    check_manifest,
    check_name,
    read_manifest,
    utterance_id,
    write_lines,
    write_manifest,
)
from fairseq_stack.data.resample import resample
from fairseq_stack.data.splits import SPLITS, choose_splits
from fairseq_stack.errors import InputError
from fairseq_stack.files import CannotWrite, written_beside

logger = logging.getLogger(__name__)

LABELS = ("utterance", "speaker", "language", "text", "keyword")
# What libsndfile opens, by its names for the formats and by what files are called.
SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW") | frozenset(
    ".aif .aifc .aff .wave .bwf .oga .opus .mp1 .mp2 .mpga .snd .sph .sf .8svx .iff .mat .gsm".split()
)
# Audio, but of a kind that libsndfile does not open.
_OTHER_AUDIO = frozenset(
    ".m4a .m4b .aac .mp4 .mov .wma .webm .mka .mkv .avi .amr .awb .3gp .ac3 .ape .wv .tta .spx .shn .dss .ra .mid"
    " .raw .pcm .vox .ul .al .ulaw .alaw .g722 .g729 .adpcm .lpc .sil".split()
)
_OFTEN_DATA = frozenset((".mat", ".mat4", ".mat5", ".htk", ".iff", ".xi", ".sds", ".sf"))  # and audio at times
QUIET = 2**-8  # of full scale: with a lower peak, 16 bits hold less than 8 of the waveform

# Debian's recordings of telephone prompts; the first package has the English texts and no audio.
PACKAGES = (
    "asterisk-core-sounds-en",
    "asterisk-core-sounds-en-wav",
    "asterisk-core-sounds-es-wav",
    "asterisk-core-sounds-fr-wav",
    "asterisk-core-sounds-it-wav",
    "asterisk-core-sounds-ru-wav",
    "asterisk-prompt-es-co",
    "asterisk-prompt-fr-armelle",
    "asterisk-prompt-it-menardi-wav",
)
# The packages' folders: speaker and language. Allison Smith recorded two languages; July Jiménez
# (es) and Armelle Desjardins (fr) are named in their packages' documents only.
VOICES = {
    "en_US_f_Allison": ("Allison", "en"),
    "es_MX_f_Allison": ("Allison", "es"),
    "es": ("July", "es"),
    "fr_CA_f_June": ("June", "fr"),
    "fr": ("Armelle", "fr"),
    "it_IT_m_Carlo": ("Carlo", "it"),
    "it_IT_f_Menardi": ("Menardi", "it"),
    "ru_RU_f_IvrvoiceRU": ("IvrvoiceRU", "ru"),
}
WITHOUT_SAMPLES = "ru_RU_f_IvrvoiceRU/is"  # Debian ships a bare WAV header

LIBRISPEECH = {"train": "train-*", "valid": "dev-*", "test": "test-*"}


@dataclass(frozen=True)
class Recording:
    """An audio file as it is found, and what is known about it.

    Attributes:
        source: the file.
        utterance: its id, which is its path below the manifest's root without the suffix.
        speaker, language, text: empty where unknown.
        keyword: the digit or letter that is said, if it is one alone.
        prompt: what is to be said, by a name that other speakers' recordings of it have too; empty where
            unknown.
    """

    source: Path
    utterance: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    keyword: str = ""
    prompt: str = ""


def prepare(source, output, grouping="prompt", bad_audio_limit=BAD_AUDIO_LIMIT):
    """Prepare `source`, a folder or the word "asterisk", in the folder `output`.

    Runs again where it was stopped: packages and audio that are there are reused, the manifests are
    written last.

    Args:
        source, output: see above.
        grouping: what is to be in one split only: "prompt" or "speaker" (see choose_splits).
        bad_audio_limit: the share of the recordings that may be unusable; they are logged and left out.

    Raises:
        InputError: the source is missing or has no audio, more of it than that is unusable, its prompts do
            not suffice for three splits, or a package cannot be fetched.
    """
    output = Path(os.path.abspath(output))
    if source == "asterisk":
        prepare_asterisk(output, grouping, bad_audio_limit)
        return
    source = Path(os.path.abspath(source))
    if not source.is_dir():
        raise InputError(f"--source {source}: is not a folder; give a folder of audio, or asterisk")
    if any((source / "LibriSpeech").glob("train-*")):
        source = source / "LibriSpeech"
    if any(source.glob("train-*/*/*/*.flac")):
        prepare_librispeech(source, output, bad_audio_limit)
        return
    recordings = folder_recordings(source, output)
    if grouping == "speaker":
        recordings = [_named_after_folder(recording) for recording in recordings]
    prepare_recordings(recordings, output, grouping, bad_audio_limit)


# Debian's recordings


def prepare_asterisk(output, grouping, bad_audio_limit):
    """Fetch and unpack Debian's recordings below `output`, and prepare them."""
    packages = output / "packages"
    unpacked = packages / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        for archive in fetch_packages(PACKAGES, packages):
            complaint = f"{archive}: cannot be unpacked; remove it and start again"
            _run(["dpkg", "-x", archive, unpacked], complaint)
        prepare_recordings(asterisk_recordings(unpacked), output, grouping, bad_audio_limit)
    finally:
        shutil.rmtree(unpacked)


def fetch_packages(packages, folder):
    """Fetch the Debian packages that `folder` does not hold yet; return the paths of all of them.

    Needs no root: apt's lists of packages are made afresh in a folder of their own.
    """
    archives = {package: next(folder.glob(f"{package}_*.deb"), None) for package in packages}
    missing = [package for package, archive in archives.items() if archive is None]
    if missing:
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        lists, cache = unfinished / "lists", unfinished / "cache"
        (lists / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
        complaint = f"cannot be fetched; if its .deb file is elsewhere, copy it into {folder}"
        # Without a network `update` warns and succeeds, and only `download` fails, for lack of lists.
        warnings = _run([*apt, "update"], f"{missing[0]}: {complaint}").splitlines()
        complaint = "; ".join([complaint, *warnings[:1]])
        for package in tqdm(missing, desc="fetching", unit=" packages", mininterval=1):
            _run([*apt, "download", package], f"{package}: {complaint}", cwd=unfinished)
            fetched = next(unfinished.glob("*.deb"))
            archives[package] = folder / fetched.name
            os.replace(fetched, archives[package])
        shutil.rmtree(unfinished)
    return list(archives.values())


def _run(command, complaint, cwd=None):
    """Run a command and return what it warns of; if it fails, raise the complaint with the reason."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise InputError(f"{complaint} ({command[0]}: {error.strerror})") from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"{complaint} ({reason})")
    return done.stderr


def asterisk_recordings(unpacked):
    """Return the recordings in the unpacked packages, without silence and tones."""
    texts = {}
    for document in Path(unpacked, "usr/share/doc/asterisk-core-sounds-en").glob("core-sounds-en.txt*"):
        with (gzip.open if document.suffix == ".gz" else open)(document, "rt", encoding="utf-8") as file:
            # Lines such as "digits/1: one"; a comment starts with a semicolon.
            pairs = (line.partition(": ") for line in file if not line.startswith(";"))
            texts = {name: " ".join(text.split()) for name, colon, text in pairs if colon}

    recordings = []
    for folder, (speaker, language) in VOICES.items():
        root = Path(unpacked, "usr/share/asterisk/sounds", folder)
        for path in _files(root, (".wav", ".gsm")):
            name = utterance_id(path.relative_to(root).as_posix())
            text = texts.get(name, "")
            # "[ascending tones]" and "(1 second of silence)" tell what is heard instead of speech.
            if text.startswith(("[", "(")) or f"{folder}/{name}" == WITHOUT_SAMPLES:
                continue
            recordings.append(
                Recording(
                    source=path,
                    utterance=f"{folder}/{name}",
                    speaker=speaker,
                    language=language,
                    # "at [@]" is said as "at".
                    text=re.sub(r" \[.*\]", "", text) if language == "en" else "",
                    keyword=name[-1] if re.fullmatch("digits/[0-9]|letters/[a-z]", name) else "",
                    prompt=os.path.basename(name),
                )
            )
    return recordings


# Other sources


def folder_recordings(source, output):
    """Return the audio files below `source`, apart from those in `output`; log what is left aside and why."""
    if source == output or output / "audio" in (source, *source.parents):
        raise InputError(f"--output {output}: would mix with the audio of --source; choose another folder")
    recordings, aside = [], defaultdict(Counter)
    for path in _files(source):
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


def _reason_to_leave(path):
    """Why a file is no recording; None if it is one."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return "their names begin with a dot"
    if suffix in _OTHER_AUDIO:
        return "audio of a kind that cannot be read here; convert it to FLAC, such as with ffmpeg"
    if suffix not in SUFFIXES:
        return "no audio by their suffix"
    if suffix in _OFTEN_DATA:
        try:
            soundfile.info(os.fsencode(path))
        except soundfile.SoundFileError:
            return "no audio in them"
    return None


def _named_after_folder(recording):
    """The recording with its first folder below the source as the speaker."""
    folder, slash, _ = recording.utterance.partition("/")
    return replace(recording, speaker=folder if slash else "")


def _files(root, suffixes=""):
    """List the files below `root` in a fixed order; a folder with two names is visited once."""
    found, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        found += [Path(folder, name) for name in sorted(names) if name.lower().endswith(suffixes)]
    return found


def prepare_librispeech(source, output, bad_audio_limit):
    """Write manifests and labels of LibriSpeech, whose FLAC files and splits are used as they are."""
    recordings, split = [], {}
    for name, folders in LIBRISPEECH.items():
        chapters = sorted(source.glob(f"{folders}/*/*"))
        for chapter in tqdm(chapters, desc=folders, unit=" chapters", mininterval=1):
            texts = {}
            for document in chapter.glob("[!.]*.trans.txt"):
                lines = document.read_text(encoding="utf-8").splitlines()
                texts.update(line.split(" ", 1) for line in lines if " " in line)
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


def _librispeech_length(recording):
    """The Result of a file that is used as it is."""
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
    """What became of a recording.

    Attributes:
        samples: of the audio to train on.
        problem: a line that names the file and says why it cannot be used.
        peak: of the waveform, if it was converted just now; full scale is 1.
        digest: of the samples.
    """

    samples: int = 0
    problem: str | None = None
    peak: float = 0.0
    digest: bytes = b""


def prepare_recordings(recordings, output, grouping="prompt", bad_audio_limit=BAD_AUDIO_LIMIT):
    """Convert recordings to FLAC in output/audio, split them, write manifests and labels."""
    counts = Counter(recording.utterance for recording in recordings)
    several = [utterance for utterance, count in counts.items() if count > 1]
    if several:
        raise InputError(
            f"--source has {counts[several[0]]} files named {several[0]} of different suffix"
            + (f", and {len(several) - 1} more such names" if several[1:] else "")
            + "; keep one of each"
        )
    copies = find_copies(recordings)
    choose_splits(recordings, copies, grouping)  # before the work: is there enough to split?

    audio = output / "audio"
    results = _convert_all([recording for recording in recordings if recording.utterance not in copies], audio)
    # What has the same bytes as an unusable file is as unusable, and is to be named too.
    lost = [
        recording
        for recording in recordings
        if copies.get(recording.utterance) in results and results[copies[recording.utterance]].problem
    ]
    results.update(_convert_all(lost, audio))
    loud = {utterance: result.peak for utterance, result in results.items() if result.peak > 1}
    if loud:
        loudest = max(loud, key=loud.get)
        logger.warning(
            f"{len(loud)} recordings overshoot full scale; each was scaled down to it as a whole, most"
            f" {loudest} with a peak of {loud[loudest]:.3f}"
        )
    _check_bad_audio(results, recordings, bad_audio_limit)
    if copies:
        logger.warning(f"{len(copies)} files left aside: the same as another (such as {next(iter(copies))})")

    good = [recording for recording in recordings if not results.get(recording.utterance, Result()).problem]
    first = {}  # by what they sound like, whatever the format
    same = {
        utterance: first.setdefault(result.digest, utterance)
        for utterance, result in results.items()
        if not result.problem
    }
    split = choose_splits(good, {**same, **copies}, grouping)
    _write(output, audio, [recording for recording in good if recording.utterance not in copies], split, results)


def find_copies(recordings):
    """Return {utterance: earlier utterance whose file has the same bytes}."""
    by_size = defaultdict(list)
    for recording in recordings:
        if os.access(recording.source, os.R_OK):  # the conversion reports what is missing
            by_size[recording.source.stat().st_size].append(recording)
    copies = {}
    for same_size in by_size.values():
        first = {}
        for recording in same_size if len(same_size) > 1 else ():
            original = first.setdefault(_digest(recording.source), recording.utterance)
            if original != recording.utterance:
                copies[recording.utterance] = original
    return copies


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.digest()


def _convert_all(recordings, audio):
    """{utterance: Result} of recordings, converted to FLAC in the folder `audio` on all cores."""
    jobs = [(recording.source, audio / f"{recording.utterance}.flac") for recording in recordings]
    for folder in {target.parent for _, target in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    if not jobs:
        return {}
    # Workers are forked from a server that has imported everything once and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(mp_context=context)
    try:
        return _finished(pool.map(_convert, jobs, chunksize=16), recordings, "converting")
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest


def _convert(job):
    """Convert (source, target), unless that was done before; returns a Result.

    Raises:
        CannotWrite: the target.
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
                # 16 bits would clip what is louder, and would lose what is much quieter.
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


def _converted_before(target, version):
    """The samples of a converted file; None if there is none, or one of another version of its source."""
    with suppress(soundfile.LibsndfileError, OSError):
        with soundfile.SoundFile(os.fsencode(target)) as file:
            if file.comment == version:
                return file.frames
    return None


def _write_flac(source, target, comment, gain=1.0, subtype="PCM_16"):
    """Write any audio as 16 kHz mono FLAC; returns its samples, and its peak without the gain.

    FLAC has checksums, so that later damage does not go unnoticed.
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
    """A file that keeps the OSError of a write that failed, such as on a full disk: libsndfile does not tell of it."""

    failure = None

    def write(self, data):
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return len(data)


def _finished(results, recordings, doing):
    """Collect the Result of each recording into {utterance: Result}."""
    bar = tqdm(results, total=len(recordings), desc=doing, unit=" files", mininterval=1)
    # The bar first, so that it sees its end.
    return {recording.utterance: result for result, recording in zip(bar, recordings)}


def _check_bad_audio(results, recordings, limit):
    """Log each recording that cannot be used; raise InputError if there are too many."""
    problems = {utterance: result.problem for utterance, result in results.items() if result.problem}
    try:
        BadAudio("--source", len(recordings), "skip", limit, "--bad-audio-limit").report(problems)
    except InputError as error:
        raise InputError(f"{error}; no manifest was written") from None


# Results


def _write(output, root, recordings, split, results):
    """Write the labels, then the manifests of FLAC files below `root`; train.tsv comes last."""
    output.mkdir(parents=True, exist_ok=True)
    recordings = [recording for recording in recordings if not results[recording.utterance].problem]
    rows = (tuple(getattr(recording, label) for label in LABELS) for recording in recordings)
    write_lines(output / "labels.tsv", map("\t".join, (LABELS, *rows)))
    for name in reversed(SPLITS):
        chosen = [recording.utterance for recording in recordings if split[recording.utterance] == name]
        entries = [(f"{utterance}.flac", results[utterance].samples) for utterance in chosen]
        if entries:
            write_manifest(output / f"{name}.tsv", root, entries)
        else:  # LibriSpeech without its test folders
            (output / f"{name}.tsv").unlink(missing_ok=True)


def _manifests(output):
    """The manifests in `output`; only test.tsv may be missing."""
    paths = [Path(output, f"{name}.tsv") for name in SPLITS]
    return [path for path in paths if path.exists() or path.stem != "test"]


def check_speech(output):
    """Compare the manifests in `output` with their files; return the problems, one line each."""
    return [problem for path in _manifests(output) for problem in check_manifest(path, SHORTEST)]


def summary(output):
    """One line: files and hours of every split."""
    parts = []
    for path in _manifests(output):
        manifest = read_manifest(path)
        hours = manifest.samples.sum() / SAMPLE_RATE / 3600
        parts.append(f"{path.stem} {len(manifest):,} files, {hours:.2f} h")
    return f"{output}: {'; '.join(parts)}"
