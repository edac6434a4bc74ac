"""Speaker verification: a linear head that separates training speakers, and the cosine of what it makes of others."""

from functools import partial
from typing import Any

import numpy as np
import torch
from s3prl.nn.common import UtteranceLevel
from s3prl.nn.speaker_loss import amsoftmax
from torch import Tensor

from fairseq_stack.analysis.intervals import bootstrap
from fairseq_stack.evaluation.heads import Probe, best_on_means, of_means
from fairseq_stack.evaluation.tasks import Pairs, Task

EMBEDDING = 256  # features of the embedding that is compared
MARGIN, SCALE = 0.4, 30.0  # of the AM-softmax, as in SUPERB


class SpeakerProbe(Probe):
    """A Probe whose outputs are an embedding, and SUPERB's loss on it.

    Args:
        upstream: gives the number and the width of the hidden states.
        speakers: number of training speakers.
    """

    def __init__(self, upstream: Any, speakers: int):
        super().__init__(upstream, UtteranceLevel, EMBEDDING)
        self.loss = amsoftmax(EMBEDDING, speakers, MARGIN, SCALE)


def verify(task: Task, means: dict[str, Tensor], upstream: Any, seed: int) -> dict[str, Any]:
    """Trains and tests a probe for each fold. Every pair of test recordings is a trial.

    Args:
        task: its answers are speakers; those of train, valid and test differ.
        means: from `extract`.
        upstream: gives the shape of the hidden states.
        seed: of the head's initial weights and of the batches.

    Returns:
        {"test": equal error rate, the mean over the folds, "resampled": its bootstrap, "valid": the same,
        "learning_rates": one for each fold, "layer_weights": their mean over the folds}.
    """
    tests, valid_rates, learning_rates, weights = [], [], [], []
    for fold in task.folds:
        valid, test = (Trials(part) for part in (fold.valid, fold.test))
        x = torch.stack([means[recording.utterance] for recording, _ in fold.train])
        index = {speaker: number for number, speaker in enumerate(sorted({speaker for _, speaker in fold.train}))}
        answers = torch.tensor([index[speaker] for _, speaker in fold.train])

        score, learning_rate, probe = best_on_means(
            x,
            answers,
            partial(SpeakerProbe, upstream, len(index)),
            lambda probe, outputs, answers: probe.loss(outputs, answers)[0],
            lambda probe, valid=valid: -valid.error_rate(probe, means),
            seed,
        )
        with torch.no_grad():
            scores = test.scores(probe, means)
        order = np.argsort(-scores)  # once, for all resamples
        tests.append([column[order] for column in (scores, test.same, test.first, test.second)])
        valid_rates.append(-score)
        learning_rates.append(learning_rate)
        weights.append(probe.layer_weights())

    ends = np.cumsum([len(fold.test) for fold in task.folds])

    def mean_rate(times):
        rates = [
            equal_error_rate(scores, same, of_fold[first] * of_fold[second])
            for (scores, same, first, second), of_fold in zip(tests, np.split(times, ends[:-1]))
        ]
        return float(np.nanmean(rates))

    return {
        "test": mean_rate(np.ones(ends[-1])),
        "resampled": bootstrap(int(ends[-1]), mean_rate),
        "valid": float(np.mean(valid_rates)),
        "learning_rates": learning_rates,
        "layer_weights": np.mean(weights, axis=0).tolist(),
    }


class Trials:
    """All pairs of the recordings of a part of a fold.

    Args:
        part: recordings with their speakers.
    """

    def __init__(self, part: Pairs):
        self.part = part
        speakers = np.array([speaker for _, speaker in part])
        self.first, self.second = np.triu_indices(len(part), 1)
        self.same = speakers[self.first] == speakers[self.second]

    def scores(self, probe: Probe, means: dict[str, Tensor]) -> np.ndarray:
        """Returns the cosine of the embeddings of each pair."""
        x = torch.stack([means[recording.utterance] for recording, _ in self.part])
        embeddings = torch.nn.functional.normalize(of_means(probe, x), dim=1)
        return (embeddings @ embeddings.T).numpy()[self.first, self.second]

    def error_rate(self, probe: Probe, means: dict[str, Tensor]) -> float:
        """Returns the equal error rate."""
        return equal_error_rate(self.scores(probe, means), self.same)


def equal_error_rate(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Returns the rate at which as many pairs of one speaker are missed as pairs of two are accepted.

    Between two thresholds, the rates are interpolated, as s3prl does.

    Args:
        scores: of the pairs; higher for the same speaker.
        same: whether a pair has one speaker.
        weights: of the pairs, such as how often each counts.

    Returns:
        the rate; nan if there are no pairs of one speaker, or of two.
    """
    order = np.argsort(-scores, kind="stable")
    accepted, alarms = ((kind * weights)[order].cumsum() for kind in (same, ~same))
    if not (accepted[-1] and alarms[-1]):
        return float("nan")
    last = np.append(np.diff(scores[order]) != 0, True)  # a threshold accepts all pairs of a score, or none
    misses = np.append(1, 1 - accepted[last] / accepted[-1])
    alarms = np.append(0, alarms[last] / alarms[-1])
    after = int(np.argmax(alarms >= misses))
    before = after - 1
    # The rates cross between two thresholds.
    gap = misses - alarms
    share = gap[before] / (gap[before] - gap[after])
    return float(alarms[before] + share * (alarms[after] - alarms[before]))
