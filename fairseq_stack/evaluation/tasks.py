"""The tasks of the probes: their training, validation and test recordings with the correct answers."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.recordings import LABELS, PHONES
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError, check_choice
from fairseq_stack.registry import Registry

LONGEST_SECONDS = 10  # longer recordings are cut, or left out if their whole text is needed
METRICS = {  # {metric: its short name}
    "accuracy": "accuracy",
    "character error rate": "CER",
    "phoneme error rate": "PER",
    "equal error rate": "EER",
}
VERIFICATION_FOLDS = 5
SILENCES = ("pau",)  # labels of phones.tsv that are no phones


@dataclass(frozen=True)
class LabelledRecording:
    """A recording of prepared speech.

    Attributes:
        utterance: its id.
        path: the file.
        samples: its length in samples.
        split: train, valid or test.
        labels: {column of phones.tsv and labels.tsv: text}; "" if unknown.
    """

    utterance: str
    path: str
    samples: int
    split: str
    labels: dict[str, str]


Pairs = list[tuple[LabelledRecording, str]]  # recordings with their answers


@dataclass(frozen=True)
class Fold:
    """The data for training and testing one probe."""

    train: Pairs
    valid: Pairs
    test: Pairs


@dataclass(frozen=True)
class Task:
    """A task of a probe.

    Attributes:
        name: in TASKS.
        folds: the score is over the test recordings of all folds together.
        classes: the possible answers, sorted; empty if the answers are texts, or speakers to verify.
        metric: in METRICS.
    """

    name: str
    folds: list[Fold]
    classes: tuple[str, ...]
    metric: str = "accuracy"

    @property
    def recordings(self) -> dict[str, LabelledRecording]:
        """The recordings of all folds, by utterance."""
        parts = [part for fold in self.folds for part in (fold.train, fold.valid, fold.test)]
        return {recording.utterance: recording for part in parts for recording, _ in part}

    @property
    def chance(self) -> float:
        """The accuracy if every answer is the most frequent answer of the training set."""
        hits = [
            sum(answer == Counter(a for _, a in fold.train).most_common(1)[0][0] for _, answer in fold.test)
            for fold in self.folds
        ]
        return sum(hits) / sum(len(fold.test) for fold in self.folds)


def read_labelled_speech(folder: str | Path) -> list[LabelledRecording]:
    """Returns the recordings of a folder that fairseq-stack prepare made.

    Raises:
        InputError: a manifest or labels.tsv is missing, a file is malformed, or a recording has no labels.
    """
    folder = Path(folder)
    path = folder / "labels.tsv"
    labels = _read_table(path, LABELS)
    phones = _read_table(folder / "phones.tsv", PHONES) if (folder / "phones.tsv").exists() else {}
    recordings = []
    for split in SPLITS:
        manifest = read_manifest(folder / f"{split}.tsv")
        for index in range(len(manifest)):
            utterance = manifest.utterance(index)
            if utterance not in labels:
                raise InputError(f"{path}: has no line for {utterance} of {split}.tsv; prepare the speech again")
            known = {**dict.fromkeys(PHONES, ""), **phones.get(utterance, {}), **labels[utterance]}
            recordings.append(
                LabelledRecording(utterance, manifest.path(index), int(manifest.samples[index]), split, known)
            )
    return recordings


def _read_table(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Returns {utterance: {column: text}} of a file that fairseq-stack prepare wrote.

    It has the `columns`, and may have others that a user added.
    """
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it with fairseq-stack prepare") from None
    names = header.split("\t")
    if lacking := [column for column in columns if column not in names]:
        raise InputError(f"{path}:1: lacks the column {lacking[0]} in its first line; prepare the speech again")
    table = {}
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise InputError(f"{path}:{number}: has {len(fields)} fields instead of {len(names)}; prepare again")
        row = dict(zip(names, fields))
        table[row[columns[0]]] = row
    return table


def read_tasks(folder: str | Path) -> tuple[list[Task], dict[str, str]]:
    """Returns find_tasks of the recordings of a folder that fairseq-stack prepare made.

    Raises:
        InputError: as read_labelled_speech, or the labels allow no task.
    """
    tasks, without = find_tasks(read_labelled_speech(folder))
    if not tasks:
        reasons = "; ".join(f"{task}: {why}" for task, why in without.items())
        raise InputError(f"--speech {folder}: its labels allow no task ({reasons})")
    return tasks, without


def find_tasks(recordings: Sequence[LabelledRecording], most: int = 1000) -> tuple[list[Task], dict[str, str]]:
    """Returns the tasks of TASKS that the labels allow, and {name: reason} for the others.

    Args:
        recordings: of all splits.
        most: recordings of a split to use at most, chosen by a hash of their names.
    """
    found, missing = [], {}
    for name, (make, metric) in TASKS.items():
        try:
            found.append(Task(name, *make(recordings, most), metric=metric))
        except NoTask as reason:
            missing[name] = str(reason)
    return found, missing


class NoTask(Exception):
    """The labels do not allow a task; the message says why."""


def _with_metric(make, metric="accuracy"):
    check_choice("metric", metric, METRICS)
    return make, metric


# Functions of (recordings, most), see `find_tasks`, that return folds and classes of a Task or raise NoTask; and the
# metric, which the decorator takes.
TASKS = Registry("probe task", entry=_with_metric)


@TASKS.register("speaker")
def _speaker(recordings, most):
    """Who speaks.

    The prepared splits share no prompt, so the sentences of the test set are in no training set, neither the probe's
    nor the student's.
    """
    return classification([(recording, recording.labels["speaker"]) for recording in recordings], most)


@TASKS.register("language")
def _language(recordings, most):
    """Which language is spoken, with the same splits."""
    return classification([(recording, recording.labels["language"]) for recording in recordings], most)


@TASKS.register("keyword")
def _keyword(recordings, most):
    """Which digit or letter is spoken.

    A keyword is its own prompt, so a probe is tested on new voices instead of new prompts. A voice is a speaker in a
    language. Each voice whose language has another voice is tested in one fold and is training data in the others.
    """
    folds = _voices([recording for recording in recordings if recording.labels["keyword"]])
    if not folds:
        raise NoTask("no two languages have keywords of two voices each")
    parts = [part for fold in folds for part in (fold.train, fold.valid, fold.test)]
    return folds, tuple(sorted({answer for part in parts for _, answer in part}))


@TASKS.register("recognition", metric="character error rate")
def _recognition(recordings, most):
    """What is said, with the prepared splits, in the language that has the most texts."""
    spoken = defaultdict(list)
    for recording in recordings:
        text = plain_text(recording.labels["text"])
        if text and recording.samples <= LONGEST_SECONDS * SAMPLE_RATE:
            spoken[recording.labels["language"]].append((recording, text))
    return _transcription(max(spoken.values(), key=len, default=[]), most, "text")


@TASKS.register("phoneme", metric="phoneme error rate")
def _phoneme(recordings, most):
    """Which phones are said in the first LONGEST_SECONDS, silence left out, with the prepared splits."""
    spoken = []
    for recording in recordings:
        phones, ends = (recording.labels.get(column, "").split() for column in ("phones", "ends"))
        heard = [phone for phone, end in zip(phones, ends) if float(end) <= LONGEST_SECONDS and phone not in SILENCES]
        if heard:
            spoken.append((recording, " ".join(heard)))
    return _transcription(spoken, most, "phone")


def _transcription(spoken, most, label):
    """Folds and classes of a task that keeps the prepared splits and whose answers are texts."""
    fold = _split(spoken, most)
    if not (fold.train and fold.valid and fold.test):
        raise NoTask(f"a split has no recording with a {label}")
    return [fold], ()


@TASKS.register("verification", metric="equal error rate")
def _verification(recordings, most):
    """Whether the same speaker speaks in two recordings.

    The speakers of test are in neither train nor valid, nor those of valid in train. If the prepared splits share
    speakers, speakers are dealt into groups: each group is tested in one fold, on the recordings of test. The next
    group is valid, and the others train.
    """
    labelled = [(recording, speaker) for recording in recordings if (speaker := recording.labels["speaker"])]
    fold = _split(labelled, most)
    parts = [Counter(speaker for _, speaker in part) for part in (fold.train, fold.valid, fold.test)]
    together = sum(parts, Counter())
    if sum(map(len, parts)) == len(together):
        folds = [fold]
    else:
        number = min(VERIFICATION_FOLDS, len(together) // 2)
        if number < len(SPLITS):
            raise NoTask(f"the number of speakers is {len(together)}; at least {2 * len(SPLITS)} are needed")
        # Dealt from the speaker of most recordings on, so that each fold has much to test.
        group = {speaker: rank % number for rank, (speaker, _) in enumerate(together.most_common())}
        folds = [
            Fold(
                [pair for pair in fold.train if group[pair[1]] not in (tested, (tested + 1) % number)],
                [pair for pair in fold.valid if group[pair[1]] == (tested + 1) % number],
                [pair for pair in fold.test if group[pair[1]] == tested],
            )
            for tested in range(number)
        ]
    for fold in folds:
        if len({speaker for _, speaker in fold.train}) < 2:
            raise NoTask("train has fewer than two speakers")
        for part in (fold.valid, fold.test):
            speakers = Counter(speaker for _, speaker in part)
            if len(speakers) < 2 or speakers.most_common(1)[0][1] < 2:
                raise NoTask("valid or test has no two recordings of one speaker, or has only one speaker")
    return folds, ()


def classification(labelled: Pairs, most: int) -> tuple[list[Fold], tuple[str, ...]]:
    """Returns folds and classes of a task that keeps the prepared splits.

    Args:
        labelled: recordings with their answers; those with an empty answer are left out.
        most: recordings of a split to use at most.

    Raises:
        NoTask: valid or test is empty or has answers that train does not have, or train has fewer than two answers.
    """
    fold = _split([(recording, answer) for recording, answer in labelled if answer], most)
    classes = {answer for _, answer in fold.train}
    if len(classes) < 2:
        raise NoTask(f"the number of different answers in train is {len(classes)}; at least two are needed")
    if not (fold.valid and fold.test):
        raise NoTask("valid or test has no labelled recording")
    if any(answer not in classes for _, answer in fold.valid + fold.test):
        raise NoTask("valid or test has answers that train does not have")
    return [fold], tuple(sorted(classes))


def plain_text(text: str) -> str:
    """Returns text in lower case without punctuation other than apostrophes, as ASR is scored.

    Marks stay, because they are part of a letter: the vowel signs of Hindi, the tones of Thai.
    """
    # A typographic apostrophe is one between two letters; elsewhere, the sign closes a quotation.
    text = re.sub(r"(?<=\w)\N{RIGHT SINGLE QUOTATION MARK}(?=\w)", "'", unicodedata.normalize("NFC", text.casefold()))
    kept = (
        sign if sign.isalnum() or sign == "'" or unicodedata.category(sign).startswith("M") else " " for sign in text
    )
    return " ".join("".join(kept).split())


def _split(labelled, most):
    """A Fold of the prepared splits."""

    def order(pair):
        return hashlib.sha256(pair[0].utterance.encode("utf-8", "surrogateescape")).digest()

    return Fold(*(sorted((pair for pair in labelled if pair[0].split == split), key=order)[:most] for split in SPLITS))


def _voices(recordings):
    """One Fold for each voice whose language has another voice: it is the test set, and the next voice is valid."""
    voices = defaultdict(list)
    for recording in recordings:
        voice = recording.labels["language"], recording.labels["speaker"]
        if all(voice):
            voices[voice].append((recording, recording.labels["keyword"]))
    speakers = Counter(language for language, _ in voices)
    tested = sorted(voice for voice in voices if speakers[voice[0]] > 1)
    folds = []
    for voice in tested:
        # Valid has another language, so that train has a voice of both languages.
        others = [other for other in tested if other[0] != voice[0]]
        if not others:
            return []
        valid = next((other for other in others if other > voice), others[0])
        train = [pair for other in sorted(voices) if other not in (voice, valid) for pair in voices[other]]
        folds.append(Fold(train, voices[valid], voices[voice]))
    return folds
