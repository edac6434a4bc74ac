"""Probes that transcribe: CTC on a linear head, for the units of a text or for phones."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from s3prl.nn.common import FrameLevel
from torch import Tensor
from torchaudio.functional import edit_distance

from fairseq_stack.analysis.intervals import bootstrap
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation.heads import Probe, best_of, train_probe
from fairseq_stack.evaluation.tasks import Task

# s3prl's default for phoneme recognition.
LEARNING_RATES = (1e-2,)
STEPS, BATCH = 1000, 16


class Units(NamedTuple):
    """The classes of CTC's frames, besides the blank, which is the class after the last.

    Attributes:
        encode: maps an answer of a Task to numbers of units.
        decode: maps numbers of units to an answer.
        size: number of units.
        splits: {name in the result: a function that splits an answer into what the error rate counts}. The score is
            "test".
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    size: int
    splits: Mapping[str, Callable[[str], Sequence[str]]]


def text_units(texts: Sequence[str], size: int = 60) -> Units:
    """Trains sentencepiece's unigram units on texts. The score is the character error rate.

    Args:
        texts: in lower case.
        size: units at most, except that every character is a unit; short texts give fewer.
    """
    signs = len(set("".join(texts)))
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "units")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(prefix),
            vocab_size=max(size, signs + 2),  # a unit for unknown signs, and one for the space
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        units = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    return Units(units.encode, units.decode, units.get_piece_size(), {"test": list, "test_wer": str.split})


def phone_units(answers: Sequence[str]) -> Units:
    """Returns the phones of the answers as units. The score is the phoneme error rate.

    Args:
        answers: phones with spaces between.
    """
    phones = sorted({phone for answer in answers for phone in answer.split()})
    numbers = {phone: number for number, phone in enumerate(phones)}
    return Units(
        lambda answer: [numbers[phone] for phone in answer.split()],
        lambda found: " ".join(phones[number] for number in found),
        len(phones),
        {"test": str.split},
    )


def count_errors(
    found: Sequence[str], wanted: Sequence[str], split: Callable[[str], Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each transcript the edit distance from the wanted text, and the length of that text, in parts."""
    errors = [edit_distance(split(answer), split(text)) for answer, text in zip(found, wanted)]
    return np.array(errors), np.array([len(split(text)) for text in wanted])


def recognize(
    task: Task, frames: dict[str, Tensor], upstream: Any, seed: int, units_of: Callable[[Sequence[str]], Units]
) -> dict[str, Any]:
    """Trains a CTC probe and tests its transcripts.

    Args:
        task: its answers are texts.
        frames: from `extract`.
        upstream: gives the shape of the hidden states.
        seed: of the head's initial weights and of the batches.
        units_of: makes the Units from the answers of the training set, such as `text_units`.

    Returns:
        {"test": error rate, "resampled": its bootstrap, "valid": the same, "learning_rates": [the chosen one],
        "layer_weights": list}, and the other error rates of Units.splits.

    Raises:
        InputError: no training recording has a frame for each unit of its text.
    """
    (fold,) = task.folds
    units = units_of([text for _, text in fold.train])
    measure = units.splits["test"]
    train_set, valid, test = (
        [(frames[recording.utterance], text) for recording, text in part]
        for part in (fold.train, fold.valid, fold.test)
    )
    # CTC needs a frame for each unit, and one more between two equal units.
    taught = [(x, torch.tensor(units.encode(text))) for x, text in train_set]
    taught = [(x, goal) for x, goal in taught if len(goal) + int((goal[1:] == goal[:-1]).sum()) <= x.size(1)]
    if not taught:
        raise InputError(
            f"no training recording of the task {task.name} is long enough for its text; check the column of labels.tsv"
            " or phones.tsv"
        )
    # Batches of recordings with similar lengths need little padding.
    taught.sort(key=lambda entry: entry[0].size(1))

    def log_probabilities(probe, batch):
        lengths = torch.tensor([x.size(1) for x, _ in batch])
        padded = torch.zeros(len(batch), batch[0][0].size(0), int(lengths.max()), batch[0][0].size(2))
        for row, (x, _) in enumerate(batch):
            padded[row, :, : x.size(1)] = x
        return probe(list(padded.transpose(0, 1)), lengths).log_softmax(2), lengths

    def transcripts(probe, part):
        found = []
        for begin in range(0, len(part), BATCH):
            scores, lengths = log_probabilities(probe, part[begin : begin + BATCH])
            for best, length in zip(scores.argmax(2), lengths):
                path = best[:length].unique_consecutive()
                found.append(units.decode(path[path != units.size].tolist()))
        return found

    def make():
        torch.manual_seed(seed)
        return Probe(upstream, FrameLevel, units.size + 1)

    def train(probe, learning_rate):
        def loss(draw):
            begin = draw.randrange(max(1, len(taught) - BATCH + 1))
            batch = taught[begin : begin + BATCH]
            scores, lengths = log_probabilities(probe, batch)
            goals = [goal for _, goal in batch]
            sizes = torch.tensor([len(goal) for goal in goals])
            return F.ctc_loss(scores.transpose(0, 1), torch.cat(goals), lengths, sizes, units.size)

        def score():
            errors, lengths = count_errors(transcripts(probe, valid), [text for _, text in valid], measure)
            return -float(errors.sum() / lengths.sum())

        return train_probe(probe, learning_rate, STEPS, loss, score, seed)

    score, rate, probe = best_of(LEARNING_RATES, make, train)
    with torch.no_grad():
        found = transcripts(probe, test)
    counts = {name: count_errors(found, [text for _, text in test], split) for name, split in units.splits.items()}
    errors, lengths = counts["test"]
    return {
        **{name: float(errors.sum() / lengths.sum()) for name, (errors, lengths) in counts.items()},
        "resampled": bootstrap(len(test), lambda times: times @ errors / (times @ lengths)),
        "valid": -score,
        "learning_rates": [rate],
        "layer_weights": probe.layer_weights(),
    }
