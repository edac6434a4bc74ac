"""Debian's packages with recorded speech: fetches and unpacks them, and reads the labels that come with the audio.

The licences stay with the audio: CC BY-SA for the telephone prompts, BSD-like for festvox-ru, GPL-2 for fillets-ng and
GPL-2+ for klettres.
"""

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tqdm import tqdm

from fairseq_stack.data.manifest import utterance_id
from fairseq_stack.data.recordings import Recording, files_below
from fairseq_stack.errors import InputError

# Debian's packages with recordings of telephone prompts. The first has the English texts and no audio.
ASTERISK = (
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
# {a folder of ASTERISK: (speaker, language)}. Allison Smith recorded two languages. The names of July Jiménez
# (es) and Armelle Desjardins (fr) are only in their packages' documents.
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

# Other packages: Russian sentences with phones, the Czech dialogue of a game (its texts are in fillets-ng-data), and
# letters and syllables in twenty languages.
OTHERS = ("festvox-ru", "fillets-ng-data", "fillets-ng-data-cs", "klettres-data")
FISH = {"m": "small fish", "v": "big fish"}  # in names such as vit-m-hlava: who speaks in fillets-ng
# The folders of klettres in which one voice reads letters and syllables. Nobody has written down who reads in the
# others, and the pitch says that some have two voices.
KLETTRES_VOICES = frozenset("ar cs en_GB fr he hu it ml nb nl uk".split())


class Source(NamedTuple):
    """A source of speech in Debian.

    Attributes:
        packages: their names.
        recordings: a function that returns the Recordings of the packages unpacked in a folder.
    """

    packages: tuple[str, ...]
    recordings: Callable[[Path], list[Recording]]


@contextmanager
def unpacked_recordings(source: Source, folder: Path) -> Iterator[list[Recording]]:
    """Fetch a source's packages into `folder`, and unpack them there until the context ends.

    Raises:
        InputError: a package cannot be fetched or unpacked.
    """
    unpacked = folder / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        for archive in fetch_packages(source.packages, folder):
            complaint = f"{archive}: cannot be unpacked; remove it and start again"
            _run(["dpkg", "-x", archive, unpacked], complaint)
        yield source.recordings(unpacked)
    finally:
        shutil.rmtree(unpacked)


def fetch_packages(packages: Sequence[str], folder: Path) -> list[Path]:
    """Fetch the Debian packages that `folder` does not hold yet; return the paths of all of them.

    This needs no root, because apt writes its lists of packages to a folder inside `folder`.
    """
    archives = {package: archive for package in packages for archive in folder.glob(f"{package}_*.deb")}
    missing = [package for package in packages if package not in archives]
    if missing:
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        lists, cache = unfinished / "lists", unfinished / "cache"
        (lists / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
        complaint = f"cannot be fetched; if its .deb file is elsewhere, copy it into {folder}"
        # Without a network, `update` only warns; `download` fails then, because there are no lists.
        warnings = _run([*apt, "update"], f"{missing[0]}: {complaint}").splitlines()
        complaint = "; ".join([complaint, *warnings[:1]])
        for package in tqdm(missing, desc="fetching", unit=" packages", mininterval=1):
            _run([*apt, "download", package], f"{package}: {complaint}", cwd=unfinished)
            fetched = next(unfinished.glob("*.deb"))
            archives[package] = folder / fetched.name
            os.replace(fetched, archives[package])
        shutil.rmtree(unfinished)
    return [archives[package] for package in packages]


def _run(command: Sequence[str | Path], complaint: str, cwd: Path | None = None) -> str:
    """Run a command and return its stderr; if it fails, raise an InputError with the complaint and the reason."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise InputError(f"{complaint} ({command[0]}: {error.strerror})") from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"{complaint} ({reason})")
    return done.stderr


def asterisk_recordings(unpacked: Path) -> list[Recording]:
    """Return the telephone prompts in the unpacked packages, except silence and tones."""
    texts = {}
    for document in Path(unpacked, "usr/share/doc/asterisk-core-sounds-en").glob("core-sounds-en.txt*"):
        with (gzip.open if document.suffix == ".gz" else open)(document, "rt", encoding="utf-8") as file:
            # Lines such as "digits/1: one"; a comment starts with a semicolon.
            pairs = (line.partition(": ") for line in file if not line.startswith(";"))
            texts = {name: " ".join(text.split()) for name, colon, text in pairs if colon}

    recordings = []
    for folder, (speaker, language) in VOICES.items():
        root = Path(unpacked, "usr/share/asterisk/sounds", folder)
        for path in files_below(root, (".wav", ".gsm")):
            name = utterance_id(path.relative_to(root).as_posix())
            text = texts.get(name, "")
            # "[ascending tones]" and "(1 second of silence)" describe recordings without speech.
            if text.startswith(("[", "(")) or f"{folder}/{name}" == WITHOUT_SAMPLES:
                continue
            recordings.append(
                Recording(
                    source=path,
                    utterance=f"{folder}/{name}",
                    speaker=speaker,
                    language=language,
                    # The speaker says "at [@]" as "at".
                    text=re.sub(r" \[.*\]", "", text) if language == "en" else "",
                    keyword=name[-1] if re.fullmatch("digits/[0-9]|letters/[a-z]", name) else "",
                    prompt=os.path.basename(name),
                )
            )
    return recordings


def festvox_recordings(unpacked: Path) -> list[Recording]:
    """Return the sentences of festvox-ru, with their phones and the seconds at which each phone ends."""
    root = unpacked / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    # Lines such as ( ru_0006 "Глаз+а ленивые." ), where a plus is before a stressed vowel.
    document = (root / "etc/txt.done.data").read_text(encoding="utf-8")
    texts = dict(re.findall(r'^\( (\S+) "(.*)" \)', document.replace("+", ""), re.MULTILINE))
    recordings = []
    for path in files_below(root / "wav", ".wav"):
        # Lines such as "0.34200 125 pau" after a line with a number sign.
        _, _, labels = (root / f"lab/{path.stem}.lab").read_text(encoding="utf-8").partition("#\n")
        ends, _, phones = zip(*(line.split() for line in labels.splitlines()))
        recordings.append(
            Recording(
                source=path,
                utterance=f"festvox-ru/{path.stem}",
                speaker="nsh",
                language="ru",
                text=texts.get(path.stem, ""),
                phones=" ".join(phones),
                ends=" ".join(ends),
            )
        )
    return recordings


def fillets_recordings(unpacked: Path) -> list[Recording]:
    """Return the Czech dialogue of fillets-ng; the speaker is known if it is one of the two fish."""
    root = unpacked / "usr/share/games/fillets-ng"
    texts = {}
    for document in root.glob("script/*/dialogs_cs.lua"):
        # dialogId("vit-m-hlava", "font_small", "in English") and then dialogStr("in Czech")
        for entry in document.read_text(encoding="utf-8").split('dialogId("')[1:]:
            czech = re.search(r'dialogStr\("(.*)"\)', entry)
            if czech:
                texts[document.parent.name, entry.partition('"')[0]] = czech[1]
    recordings = []
    for path in files_below(root / "sound", ".ogg"):
        if path.parent.name != "cs":
            continue
        level = path.parent.parent.name
        fish = re.search(r"(?:^|-)([mv])-", path.stem)
        recordings.append(
            Recording(
                source=path,
                utterance=f"fillets-ng/{level}/{path.stem}",
                speaker=FISH[fish[1]] if fish else "",
                language="cs",
                text=texts.get((level, path.stem), ""),
            )
        )
    return recordings


def klettres_recordings(unpacked: Path) -> list[Recording]:
    """Return the letters and syllables of klettres."""
    root = unpacked / "usr/share/klettres"
    names = {
        sound.get("file", ""): sound.get("name", "")
        for document in root.glob("*/sounds.xml")
        for sound in ElementTree.parse(document).iter("sound")
    }
    recordings = []
    for path in files_below(root, ".ogg"):
        file = path.relative_to(root)
        folder, text = file.parts[0], names.get(file.as_posix(), "").strip()
        letter = file.parts[1] == "alpha" and re.fullmatch("[a-z]", text.casefold())
        recordings.append(
            Recording(
                source=path,
                utterance=f"klettres/{utterance_id(file.as_posix())}",
                speaker=f"klettres {folder}" if folder in KLETTRES_VOICES else "",
                language=folder.partition("_")[0],  # pt_BR is Portuguese
                text=text,
                keyword=text.casefold() if letter else "",
                prompt=text or path.stem,
            )
        )
    return recordings


def debian_recordings(unpacked: Path) -> list[Recording]:
    """Return the recordings of all packages."""
    kinds = (asterisk_recordings, festvox_recordings, fillets_recordings, klettres_recordings)
    return [recording for kind in kinds for recording in kind(unpacked)]


SOURCES = {
    "asterisk": Source(ASTERISK, asterisk_recordings),
    "debian-speech": Source((*ASTERISK, *OTHERS), debian_recordings),
}
