"""Speech preparation: audio of any kind becomes 16 kHz mono files, manifests and labels.

An output folder holds `audio/` (unless the source is used in place), `train.tsv`, `valid.tsv` and
`test.tsv` (see manifest.py) and `labels.tsv`: utterance, speaker, language, text and keyword,
separated by tabs, empty where unknown.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import soundfile
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.data.manifest import read_manifest, utterance_id, write_lines, write_manifest
from fairseq_stack.errors import InputError

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.05  # of the prompts, in valid and in test each
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
LABELS = ("utterance", "speaker", "language", "text", "keyword")

# Debian's speech. asterisk-core-sounds-en has no audio but the English texts.
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
# Folder of the recordings: speaker, language. Allison Smith recorded two languages.
VOICES = {
    "en_US_f_Allison": ("Allison", "en"),
    "es_MX_f_Allison": ("Allison", "es"),
    "fr_CA_f_June": ("June", "fr"),
    "it_IT_m_Carlo": ("Carlo", "it"),
    "ru_RU_f_IvrvoiceRU": ("IvrvoiceRU", "ru"),
    "es": ("July", "es"),
    "fr": ("Armelle", "fr"),
    "it_IT_f_Menardi": ("Menardi", "it"),
}
NO_SAMPLES = "ru_RU_f_IvrvoiceRU/is"  # comes as a bare WAV header


@dataclass(frozen=True)
class Recording:
    """One audio file as it is found, and what is known about it.

    Attributes:
        source: the file.
        utterance: its id, which is also its path below the manifest's root without the suffix.
        speaker, language, text, keyword: empty where unknown.
    """

    source: Path
    utterance: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    keyword: str = ""

    @property
    def prompt(self):
        """What was to be said: recordings of the same name are taken for the same prompt."""
        return os.path.basename(self.utterance).casefold()


def prepare(source, output):
    """Prepare `source`, a folder or the word "asterisk", in the folder `output`.

    Files that are converted already are reused; manifests and labels are written last.

    Raises:
        InputError: the source is missing, has no audio or has audio that cannot be read, the
            prompts do not suffice for three splits, or a package cannot be fetched.
    """
    output = Path(output).absolute()
    if source == "asterisk":
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=_made(output / "packages")) as tree:
            unpack_packages(PACKAGES, output / "packages", tree)
            prepare_recordings(asterisk_recordings(tree), output)
        return
    source = Path(source).absolute()
    if not source.is_dir():
        raise InputError(f"--source {source}: no such folder; give a folder of audio, or asterisk")
    if (source / "LibriSpeech").is_dir():
        source = source / "LibriSpeech"
    if any(source.glob("train-*/*/*/*.trans.txt")):
        prepare_librispeech(source, output)
    else:
        prepare_recordings(folder_recordings(source, output), output)


# Sources


def unpack_packages(packages, folder, tree):
    """Unpack Debian packages under `tree`, after fetching those that `folder` does not hold yet."""
    for package in tqdm(packages, desc="packages", unit=" packages", mininterval=1):
        archive = next(Path(folder).glob(f"{package}_*.deb"), None)
        if archive is None:
            with tempfile.TemporaryDirectory(dir=folder) as partial_folder:
                _run(package, ["apt-get", "-qq", "download", package], cwd=partial_folder)
                fetched = next(Path(partial_folder).glob("*.deb"))
                archive = Path(folder) / fetched.name
                os.replace(fetched, archive)
        _run(archive, ["dpkg", "-x", str(archive), str(tree)])


def _run(subject, command, cwd=None):
    try:
        done = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise InputError(f"{subject}: {command[0]} is not on this system") from None
    if done.returncode:
        raise InputError(f"{subject}: failed {done.stderr}")


def asterisk_recordings(tree):
    """Return the recordings of unpacked asterisk packages, without tones and silence."""
    texts = {}
    for path in Path(tree).glob("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt*"):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for line in file:
                name, colon, text = line.partition(": ")
                if colon and not line.startswith(";"):
                    texts[name] = " ".join(text.split())
    # A text such as "[ascending tones]" or "(1 second of silence)" describes what is not speech.
    not_speech = {name for name, text in texts.items() if text[:1] in ("[", "(")}

    recordings = []
    for folder, (speaker, language) in VOICES.items():
        root = Path(tree, "usr/share/asterisk/sounds", folder)
        for path in _audio_files(root, (".wav", ".gsm")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in not_speech or name.startswith("silence/") or f"{folder}/{name}" == NO_SAMPLES:
                continue
            is_keyword = re.fullmatch("digits/[0-9]|letters/[a-z]", name)
            recordings.append(Recording(
                source=path,
                utterance=f"{folder}/{name}",
                speaker=speaker,
                language=language,
                # "at [@]" is spoken as "at".
                text=re.sub(r"\s*\[.*?\]", "", texts.get(name, "")) if language == "en" else "",
                keyword=name[-1] if is_keyword else "",
            ))
    return recordings


def folder_recordings(source, output):
    """Return the audio files below `source`, save what was prepared from it in `output`."""
    recordings = [
        Recording(source=path, utterance=utterance_id(path.relative_to(source).as_posix()))
        for path in _audio_files(source, SUFFIXES)
        if output not in path.parents
    ]
    if not recordings:
        raise InputError(f"--source {source}: no audio in this folder; looked for *{', *'.join(SUFFIXES)}")
    return recordings


def _audio_files(root, suffixes):
    found = []
    for folder, folders, names in os.walk(root):
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes)]
    return sorted(found)


# Splits


def split_prompts(recordings):
    """Return {utterance: split}, where no two splits share a prompt or a text."""
    parent = {}

    def find(key):
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for recording in recordings:
        words = " ".join(re.findall(r"\w+", recording.text.casefold()))
        if words:
            low, high = sorted((find(("name", recording.prompt)), find(("text", words))))
            parent[high] = low
        else:
            find(("name", recording.prompt))
    groups = sorted(
        {find(("name", recording.prompt)) for recording in recordings},
        key=lambda group: hashlib.sha256(group[1].encode("utf-8", "surrogateescape")).digest(),
    )
    held_out = max(1, round(HELD_OUT * len(groups)))
    if len(groups) < 3:
        raise InputError("too few prompts")
    split = dict.fromkeys(groups, "train")
    split.update(dict.fromkeys(groups[:held_out], "test"))
    split.update(dict.fromkeys(groups[held_out:2 * held_out], "valid"))
    return {recording.utterance: split[find(("name", recording.prompt))] for recording in recordings}


# Conversion


def prepare_recordings(recordings, output):
    """Convert recordings into output/audio and write their manifests and labels."""
    split = split_prompts(recordings)
    audio = output / "audio"
    jobs = [(recording.source, audio / f"{recording.utterance}.flac") for recording in recordings]
    for folder in {target.parent for _, target in jobs}:
        _made(folder)
    lengths = {}
    with ProcessPoolExecutor(
        mp_context=get_context("forkserver"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        done = pool.map(_convert, jobs, chunksize=16)
        for recording, samples in zip(recordings, tqdm(done, total=len(jobs), desc="audio", mininterval=1)):
            lengths[recording.utterance] = samples
    write_lines(output / "labels.tsv", ["\t".join(LABELS)] + [
        "\t".join(getattr(recording, field) for field in LABELS) for recording in recordings])
    for name in reversed(SPLITS):
        write_manifest(output / f"{name}.tsv", audio, [
            (f"{utterance}.flac", samples) for utterance, samples in lengths.items() if split[utterance] == name])


def _convert(job):
    source, target = job
    with _opened(source) as file:
        rate = file.samplerate
        samples = file.read(file.frames, dtype="float32", always_2d=True)
    mono = resample(torch.from_numpy(samples).mean(1), rate, SAMPLE_RATE)
    beside = f"{target}.part"
    soundfile.write(beside, mono.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    os.replace(beside, target)
    return len(mono)


def _opened(path):
    if path.suffix == ".gsm":
        # Raw GSM 06.10 has no header; telephony knows one rate.
        return soundfile.SoundFile(path, samplerate=8_000, channels=1, format="RAW", subtype="GSM610")
    return soundfile.SoundFile(path)


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder
