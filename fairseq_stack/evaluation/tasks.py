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
        name: speaker, language, keyword or recognition.
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
        hits = [sum(answer == Counter(a for _, a in fold.train).most_common(1)[0][0] for _, answer in fold.test)
                for fold in self.folds]
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
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it with fairseq-stack prepare"
        ) from None
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
                LabelledRecording(utterance, manifest.path(index), int(manifest.samples[index]), split, labels[utterance])
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
    """The tasks that the labels allow.

    Speaker, language and recognition keep the splits of the preparation, which put no prompt into two of
    them: neither the probe nor the student was trained on a prompt that is tested. A keyword (a spoken digit or
    letter) is its own prompt, so keyword probes are tested on voices that were not in their training data: each
    voice (a speaker in a language) whose language another voice speaks too is tested in one fold and trained on in
    the others.

    Args:
        recordings: list of LabelledRecording.
        most: recordings of a split to use at most; which ones is fixed by their names.

    Returns:
        [Task], and {name: why there is none} for the others.
    """
    found, missing = [], {}
    for name in ("speaker", "language"):
        labelled = [(recording, recording.labels[name]) for recording in recordings if recording.labels[name]]
        fold = _split(labelled, most)
        classes = {answer for _, answer in fold.train}
        if len(classes) < 2:
            missing[name] = f"the training has {len(classes)} of them, and two is the least"
        elif not (fold.valid and fold.test):
            missing[name] = "valid or test has none"
        elif any(answer not in classes for _, answer in fold.valid + fold.test):
            missing[name] = "valid and test have some that the training has not"
        else:
            found.append(Task(name, [fold], tuple(sorted(classes))))

    folds = _voices([recording for recording in recordings if recording.labels["keyword"]])
    if folds:
        classes = {answer for fold in folds for part in (fold.train, fold.valid, fold.test) for _, answer in part}
        found.append(Task("keyword", folds, tuple(sorted(classes))))
    else:
        missing["keyword"] = "no two languages have keywords of two voices each"

    spoken = [
        (recording, text) for recording in recordings
        if (text := plain_text(recording.labels["text"])) and recording.samples <= LONGEST_SECONDS * SAMPLE_RATE
    ]
    fold = _split(spoken, most)
    if fold.train and fold.valid and fold.test:
        found.append(Task("recognition", [fold], ()))
    else:
        missing["recognition"] = "a split has no recording with a text"
    return found, missing


def plain_text(text):
    """Lower case without punctuation, as ASR is scored: letters, digits and apostrophes in words."""
    kept = (sign if sign.isalnum() or sign == "'" else " " for sign in text.casefold())
    return " ".join("".join(kept).split())


def _split(labelled, most):
    """A Fold of the splits of the preparation."""
    def order(pair):
        return hashlib.sha256(pair[0].utterance.encode("utf-8", "surrogateescape")).digest()

    return Fold(*(
        sorted((pair for pair in labelled if pair[0].split == split), key=order)[:most] for split in SPLITS
    ))


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
