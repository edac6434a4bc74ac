"""The tasks of the probes: which recordings are learned from, which are asked about, and the right answers."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.prepare import LABELS
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError
from fairseq_stack.registry import Registry

LONGEST_SECONDS = 10  # of a recording: longer ones are cut, or left out where their text would not fit


@dataclass(frozen=True)
class LabelledRecording:
    """A recording of prepared speech.

    Attributes:
        utterance: its id.
        path: the file.
        samples: its length.
        split: train, valid or test.
        labels: {column of labels.tsv: text}, empty where unknown.
    """

    utterance: str
    path: str
    samples: int
    split: str
    labels: dict


@dataclass(frozen=True)
class Fold:
    """A training and its test: three lists of (recording, answer)."""

    train: list
    valid: list
    test: list


@dataclass(frozen=True)
class Task:
    """What a probe has to find out.

    Attributes:
        name: in TASKS.
        folds: Folds; the score is that of all their test recordings together.
        classes: the possible answers, sorted; empty where the answer is a text.
    """

    name: str
    folds: list
    classes: tuple

    @property
    def recordings(self):
        """{utterance: LabelledRecording} of all folds."""
        parts = [part for fold in self.folds for part in (fold.train, fold.valid, fold.test)]
        return {recording.utterance: recording for part in parts for recording, _ in part}

    @property
    def chance(self):
        """The accuracy of always giving the most frequent answer of the training."""
        hits = [
            sum(answer == Counter(a for _, a in fold.train).most_common(1)[0][0] for _, answer in fold.test)
            for fold in self.folds
        ]
        return sum(hits) / sum(len(fold.test) for fold in self.folds)


def read_labelled_speech(folder):
    """The recordings of a folder that fairseq-stack prepare made.

    Raises:
        InputError: a manifest or labels.tsv is missing or malformed, or a recording has no labels.
    """
    folder = Path(folder)
    path = folder / "labels.tsv"
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it with fairseq-stack prepare") from None
    if tuple(header.split("\t")) != LABELS:
        raise InputError(f"{path}:1: is not {' '.join(LABELS)}; prepare the speech again")
    labels = {}
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != len(LABELS):
            raise InputError(f"{path}:{number}: has {len(fields)} fields instead of {len(LABELS)}; prepare again")
        labels[fields[0]] = dict(zip(LABELS, fields))
    recordings = []
    for split in SPLITS:
        manifest = read_manifest(folder / f"{split}.tsv")
        for index in range(len(manifest)):
            utterance = manifest.utterance(index)
            if utterance not in labels:
                raise InputError(f"{path}: has no line for {utterance} of {split}.tsv; prepare the speech again")
            recordings.append(
                LabelledRecording(
                    utterance, manifest.path(index), int(manifest.samples[index]), split, labels[utterance]
                )
            )
    return recordings


def read_tasks(folder):
    """find_tasks of the recordings of a folder that fairseq-stack prepare made.

    Raises:
        InputError: as read_labelled_speech, or the labels allow no task.
    """
    tasks, without = find_tasks(read_labelled_speech(folder))
    if not tasks:
        reasons = "; ".join(f"{task}: {why}" for task, why in without.items())
        raise InputError(f"--speech {folder}: its labels allow no task ({reasons})")
    return tasks, without


def find_tasks(recordings, most=1000):
    """The tasks of TASKS that the labels allow.

    Args:
        recordings: list of LabelledRecording.
        most: recordings of a split to use at most; which ones is fixed by their names.

    Returns:
        [Task], and {name: why there is none} for the others.
    """
    found, missing = [], {}
    for name, make in TASKS.items():
        try:
            found.append(Task(name, *make(recordings, most)))
        except NoTask as reason:
            missing[name] = str(reason)
    return found, missing


class NoTask(Exception):
    """The labels do not allow a task; the message says why."""


# Functions of (recordings, most), see `find_tasks`, that return folds and classes of a Task or raise NoTask.
TASKS = Registry("probe task")


@TASKS.register("speaker")
def _speaker(recordings, most):
    """Who speaks.

    The splits of the preparation put no prompt into two of them: what is tested was said by nobody in the training, nor
    heard by the student in its own.
    """
    return classification([(recording, recording.labels["speaker"]) for recording in recordings], most)


@TASKS.register("language")
def _language(recordings, most):
    """Which language is spoken, in the same splits."""
    return classification([(recording, recording.labels["language"]) for recording in recordings], most)


@TASKS.register("keyword")
def _keyword(recordings, most):
    """Which digit or letter is spoken.

    A keyword is its prompt, so the voice is what is new: of every voice (a speaker in a language) whose language
    another voice speaks too, the keywords are tested in one fold, and learned from in the others.
    """
    folds = _voices([recording for recording in recordings if recording.labels["keyword"]])
    if not folds:
        raise NoTask("no two languages have keywords of two voices each")
    parts = [part for fold in folds for part in (fold.train, fold.valid, fold.test)]
    return folds, tuple(sorted({answer for part in parts for _, answer in part}))


@TASKS.register("recognition")
def _recognition(recordings, most):
    """What is said, in the splits of the preparation."""
    spoken = [
        (recording, text)
        for recording in recordings
        if (text := plain_text(recording.labels["text"])) and recording.samples <= LONGEST_SECONDS * SAMPLE_RATE
    ]
    fold = _split(spoken, most)
    if not (fold.train and fold.valid and fold.test):
        raise NoTask("a split has no recording with a text")
    return [fold], ()


def classification(labelled, most):
    """Folds and classes of a task that keeps the splits of the preparation.

    Args:
        labelled: list of (LabelledRecording, answer); those with an empty answer are left out.
        most: recordings of a split to use at most.

    Raises:
        NoTask: valid or test is empty or has answers that the training has not, or there is one answer.
    """
    fold = _split([(recording, answer) for recording, answer in labelled if answer], most)
    classes = {answer for _, answer in fold.train}
    if len(classes) < 2:
        raise NoTask(f"the training has {len(classes)} of them, and two is the least")
    if not (fold.valid and fold.test):
        raise NoTask("valid or test has none")
    if any(answer not in classes for _, answer in fold.valid + fold.test):
        raise NoTask("valid and test have some that the training has not")
    return [fold], tuple(sorted(classes))


def plain_text(text):
    """Lower case without punctuation, as ASR is scored: letters, digits and apostrophes in words."""
    kept = (sign if sign.isalnum() or sign == "'" else " " for sign in text.casefold())
    return " ".join("".join(kept).split())


def _split(labelled, most):
    """A Fold of the splits of the preparation."""

    def order(pair):
        return hashlib.sha256(pair[0].utterance.encode("utf-8", "surrogateescape")).digest()

    return Fold(*(sorted((pair for pair in labelled if pair[0].split == split), key=order)[:most] for split in SPLITS))


def _voices(recordings):
    """One Fold for each voice with a companion: it is tested, and the next voice chooses the learning rate."""
    voices = defaultdict(list)
    for recording in recordings:
        voice = recording.labels["language"], recording.labels["speaker"]
        if all(voice):
            voices[voice].append((recording, recording.labels["keyword"]))
    speakers = Counter(language for language, _ in voices)
    tested = sorted(voice for voice in voices if speakers[voice[0]] > 1)
    folds = []
    for voice in tested:
        # Of another language, so that both keep a companion in the training.
        others = [other for other in tested if other[0] != voice[0]]
        if not others:
            return []
        after = next((other for other in others if other > voice), others[0])
        train = [pair for other in sorted(voices) if other not in (voice, after) for pair in voices[other]]
        folds.append(Fold(train, voices[after], voices[voice]))
    return folds
