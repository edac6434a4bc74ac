"""Speech preparation: audio of any kind becomes 16 kHz mono files, manifests and labels.

The output folder holds `train.tsv`, `valid.tsv` and `test.tsv` (see manifest.py), `labels.tsv` with
the columns LABELS (empty where unknown), and in `audio/` what had to be converted.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import soundfile
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE, read_any_audio
from fairseq_stack.data.manifest import (
    check_manifest,
    check_name,
    read_manifest,
    utterance_id,
    write_lines,
    write_manifest,
)
from fairseq_stack.errors import InputError

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.05  # the share of the prompts that valid and test get each
LABELS = ("utterance", "speaker", "language", "text", "keyword")
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

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
    """

    source: Path
    utterance: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    keyword: str = ""


def prepare(source, output):
    """Prepare `source`, a folder or the word "asterisk", in the folder `output`.

    Runs again where it was stopped: packages and audio that are there are reused, the manifests are
    written last.

    Raises:
        InputError: the source is missing, has no audio or audio that cannot be read, its prompts do
            not suffice for three splits, or a package cannot be fetched.
    """
    output = Path(os.path.abspath(output))
    if source == "asterisk":
        prepare_asterisk(output)
        return
    source = Path(os.path.abspath(source))
    if not source.is_dir():
        raise InputError(f"--source {source}: is not a folder; give a folder of audio, or asterisk")
    if any((source / "LibriSpeech").glob("train-*")):
        source = source / "LibriSpeech"
    if any(source.glob("train-*/*/*/*.flac")):
        prepare_librispeech(source, output)
    else:
        prepare_recordings(folder_recordings(source, output), output)


# Debian's recordings


def prepare_asterisk(output):
    """Fetch and unpack Debian's recordings below `output`, and prepare them."""
    packages = output / "packages"
    unpacked = packages / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        for archive in fetch_packages(PACKAGES, packages):
            complaint = f"{archive}: cannot be unpacked; remove it and start again"
            _run(["dpkg", "-x", archive, unpacked], complaint)
        prepare_recordings(asterisk_recordings(unpacked), output)
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
        for path in _audio_files(root, (".wav", ".gsm")):
            name = utterance_id(path.relative_to(root).as_posix())
            text = texts.get(name, "")
            # "[ascending tones]" and "(1 second of silence)" tell what is heard instead of speech.
            if text.startswith(("[", "(")) or f"{folder}/{name}" == WITHOUT_SAMPLES:
                continue
            recordings.append(Recording(
                source=path,
                utterance=f"{folder}/{name}",
                speaker=speaker,
                language=language,
                # "at [@]" is said as "at".
                text=re.sub(r" \[.*\]", "", text) if language == "en" else "",
                keyword=name[-1] if re.fullmatch("digits/[0-9]|letters/[a-z]", name) else "",
            ))
    return recordings


# Other sources


def folder_recordings(source, output):
    """Return the audio files below `source`, apart from those that lie in `output`."""
    if source == output or output / "audio" in (source, *source.parents):
        raise InputError(f"--output {output}: would mix with the audio of --source; choose another folder")
    recordings = [
        Recording(source=path, utterance=utterance_id(path.relative_to(source).as_posix()))
        for path in _audio_files(source, SUFFIXES) if output not in path.parents
    ]
    if not recordings:
        raise InputError(f"--source {source}: has no audio; looked for {', '.join(SUFFIXES)} in every folder")
    return recordings


def _audio_files(root, suffixes):
    """List the files below `root` in a fixed order; a folder with two names is visited once."""
    found, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        found += [
            Path(folder, name) for name in sorted(names)
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return found


def prepare_librispeech(source, output):
    """Write manifests and labels of LibriSpeech, whose FLAC files and splits are used as they are."""
    recordings, split = [], {}
    for name, folders in LIBRISPEECH.items():
        chapters = sorted(source.glob(f"{folders}/*/*"))
        for chapter in tqdm(chapters, desc=folders, unit=" chapters", mininterval=1):
            texts = {}
            for document in chapter.glob("*.trans.txt"):
                lines = document.read_text(encoding="utf-8").splitlines()
                texts.update(line.split(" ", 1) for line in lines if " " in line)
            for path in sorted(chapter.glob("*.flac")):
                utterance = utterance_id(path.relative_to(source).as_posix())
                speaker = chapter.parent.name
                recordings.append(Recording(path, utterance, speaker, "en", texts.get(path.stem, "")))
                split[utterance] = name
    if "valid" not in split.values():
        raise InputError(f"--source {source}: has no dev-* folder to validate on; add dev-clean")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lengths = _finished(pool.map(_librispeech_length, recordings), recordings, "reading")
    _write(output, source, recordings, split, lengths)


def _librispeech_length(recording):
    """Return the samples of a file and None, or None and what is wrong with it."""
    try:
        info = soundfile.info(recording.source)
    except soundfile.SoundFileError:
        return None, f"{recording.source}: cannot be read as audio; unpack it again"
    if (info.samplerate, info.channels) == (SAMPLE_RATE, 1) and info.frames > 0:
        return info.frames, None
    return None, (
        f"{recording.source}: has {info.frames} samples, {info.samplerate} Hz, {info.channels} channel(s)"
        f" instead of {SAMPLE_RATE} Hz mono speech; unpack it again"
    )


# Splits


def split_prompts(recordings, copies):
    """Return {utterance: split} such that no prompt, text or audio is in two splits.

    Recordings with the same file name are taken for the same prompt, whoever says it.

    Args:
        recordings: all of them, copies included.
        copies: {utterance: utterance with the same audio}.

    Raises:
        InputError: there are fewer than three prompts.
    """
    group = {}  # a union-find forest over prompts and texts

    def find(key):
        while group.setdefault(key, key) != key:
            group[key] = key = group[group[key]]
        return key

    def prompt(utterance):
        return "prompt", os.path.basename(utterance).casefold()

    for recording in recordings:
        alike = [prompt(recording.utterance), prompt(copies.get(recording.utterance, recording.utterance))]
        words = re.findall(r"\w+", recording.text.casefold())
        if words:
            alike.append(("text", " ".join(words)))
        roots = sorted(find(key) for key in alike)
        for root in roots:
            group[root] = roots[0]  # the first by name, a prompt, whatever the order of the recordings

    # The hash shuffles the groups, always in the same way.
    groups = sorted(
        {find(prompt(recording.utterance)) for recording in recordings},
        key=lambda key: hashlib.sha256(key[1].encode("utf-8", "surrogateescape")).digest(),
    )
    if len(groups) < len(SPLITS):
        raise InputError(
            f"--source has {len(groups)} different prompts; train, valid and test need one each: add more"
            f" (files with the same name or text count as one prompt)"
        )
    held_out = max(1, round(HELD_OUT * len(groups)))
    split = {key: "test" if rank < held_out else "valid" if rank < 2 * held_out else "train"
             for rank, key in enumerate(groups)}
    return {recording.utterance: split[find(prompt(recording.utterance))] for recording in recordings}


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
            digest = hashlib.sha256(recording.source.read_bytes()).digest()
            original = first.setdefault(digest, recording.utterance)
            if original != recording.utterance:
                copies[recording.utterance] = original
    return copies


# Conversion


def prepare_recordings(recordings, output):
    """Convert recordings to FLAC in output/audio, split them by prompt, write manifests and labels."""
    for utterance, count in Counter(recording.utterance for recording in recordings).items():
        check_name(utterance)
        if count > 1:
            raise InputError(f"--source has {count} files named {utterance} of different suffix; keep one")
    copies = find_copies(recordings)
    split = split_prompts(recordings, copies)
    recordings = [recording for recording in recordings if recording.utterance not in copies]

    audio = output / "audio"
    jobs = [(recording.source, audio / f"{recording.utterance}.flac") for recording in recordings]
    for folder in {target.parent for _, target in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    # Workers are forked from a server that has imported torch once and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        lengths = _finished(pool.map(_convert, jobs, chunksize=16), recordings, "converting")
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    _write(output, audio, recordings, split, lengths)


def _convert(job):
    """Convert (source, target); return the target's samples and None, or None and what is wrong."""
    source, target = job
    try:
        status = os.stat(source)
        version = f"source: {status.st_size} bytes, modified {status.st_mtime_ns} ns"
        if target.exists():
            with soundfile.SoundFile(target) as file:
                if file.comment == version:
                    return file.frames, None
        samples, rate = read_any_audio(source)
    except (InputError, OSError) as error:
        return None, str(error)
    samples = resample(torch.from_numpy(samples), rate, SAMPLE_RATE).numpy()
    # FLAC has checksums, so that later damage does not go unnoticed.
    beside = f"{target}.part"
    with soundfile.SoundFile(beside, "w", SAMPLE_RATE, channels=1, format="FLAC", subtype="PCM_16") as file:
        file.comment = version
        file.write(samples)
    os.replace(beside, target)
    return len(samples), None


def _finished(results, recordings, doing):
    """Collect (samples, problem) for each recording into {utterance: samples}."""
    lengths, problems = {}, []
    bar = tqdm(results, total=len(recordings), desc=doing, unit=" files", mininterval=1)
    for (samples, problem), recording in zip(bar, recordings):  # the bar first, so that it sees its end
        lengths[recording.utterance] = samples
        if problem:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 1} more of {len(recordings)} files)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; no manifest was written")
    return lengths


# Results


def _write(output, root, recordings, split, lengths):
    """Write the labels, then the manifests of FLAC files below `root`; train.tsv comes last."""
    output.mkdir(parents=True, exist_ok=True)
    rows = (tuple(getattr(recording, label) for label in LABELS) for recording in recordings)
    write_lines(output / "labels.tsv", map("\t".join, (LABELS, *rows)))
    for name in reversed(SPLITS):
        chosen = [utterance for utterance in lengths if split[utterance] == name]
        entries = [(f"{utterance}.flac", lengths[utterance]) for utterance in chosen]
        if entries:
            write_manifest(output / f"{name}.tsv", root, entries)
        else:  # LibriSpeech without its test folders
            (output / f"{name}.tsv").unlink(missing_ok=True)


def _manifests(output):
    """The manifests in `output`; only test.tsv may be missing."""
    paths = [Path(output, f"{name}.tsv") for name in SPLITS]
    return [path for path in paths if path.exists() or path.stem != "test"]


def check(output):
    """Compare the manifests in `output` with their files; return the problems, one line each."""
    return [problem for path in _manifests(output) for problem in check_manifest(path)]


def summary(output):
    """One line: files and hours of every split."""
    parts = []
    for path in _manifests(output):
        manifest = read_manifest(path)
        hours = manifest.samples.sum() / SAMPLE_RATE / 3600
        parts.append(f"{path.stem} {len(manifest):,} files, {hours:.2f} h")
    return f"{output}: {'; '.join(parts)}"
