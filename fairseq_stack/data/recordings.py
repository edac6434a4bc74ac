"""The recordings of a source, with their labels."""

import os
from dataclasses import dataclass
from pathlib import Path

LABELS = ("utterance", "speaker", "language", "text", "keyword")  # the columns of labels.tsv
PHONES = ("utterance", "phones", "ends")  # the columns of phones.tsv


@dataclass(frozen=True)
class Recording:
    """An audio file of the source, and its labels.

    Attributes:
        source: the file.
        utterance: its id, which is its path below the manifest's root without the suffix.
        speaker, language, text: empty if unknown.
        keyword: the digit or letter, if the speaker says nothing else; empty otherwise.
        prompt: the name of the prompt, the same for all speakers; empty if unknown.
        phones, ends: the phones, and the seconds at which each ends, with spaces between; empty if unknown.
    """

    source: Path
    utterance: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    keyword: str = ""
    prompt: str = ""
    phones: str = ""
    ends: str = ""


def files_below(root: Path, suffixes: str | tuple[str, ...] = "") -> list[Path]:
    """Return the files below `root` in a fixed order; a folder that links reach twice counts once."""
    found, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        found += [Path(folder, name) for name in sorted(names) if name.lower().endswith(suffixes)]
    return found
