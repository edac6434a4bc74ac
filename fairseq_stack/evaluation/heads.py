"""Probes: s3prl's weighted sum of the layers and SUPERB's linear heads. Those for classes, on extracted features."""

import copy
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from s3prl.nn import Featurizer
from s3prl.nn.common import FrameLevel, UtteranceLevel
from torch import Tensor

from fairseq_stack.analysis.intervals import bootstrap
from fairseq_stack.evaluation.tasks import Task

# The best one on valid is chosen for each upstream, task, fold and seed.
LEARNING_RATES = (1e-3, 1e-2)
STEPS, BATCH = 400, 64
CHECKS = 8  # validations in a training; the best checkpoint counts, as in SUPERB


class Probe(torch.nn.Module):
    """A weighted sum of the layers and a linear head, both from s3prl.

    Args:
        upstream: gives the number and the width of the hidden states.
        head: UtteranceLevel or FrameLevel. UtteranceLevel pools over time; a mean is an utterance of one frame to it.
        outputs: number of classes.
    """

    def __init__(self, upstream: Any, head: type[UtteranceLevel] | type[FrameLevel], outputs: int):
        super().__init__()
        self.featurizer = Featurizer(upstream)
        self.head = head(self.featurizer.output_size, outputs)

    def forward(self, states: list[Tensor], lengths: Tensor) -> Tensor:
        """Maps `layers` tensors [B, T, D] and lengths [B] in frames to [B, outputs], or [B, T, outputs] by frame."""
        x, frames = self.featurizer(states, [lengths] * len(states))
        outputs = self.head(x, frames)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def layer_weights(self) -> list[float]:
        """Returns the weights of the hidden states, which sum to 1."""
        weights = getattr(self.featurizer, "weights", torch.zeros(1))  # with one hidden state, s3prl has no weights
        return weights.softmax(0).tolist()


def of_means(probe: Probe, means: Tensor) -> Tensor:
    """Returns a probe's outputs [B, outputs] for means over time [B, layers, D], utterances of one frame to it."""
    return probe(list(means.transpose(0, 1)[:, :, None]), torch.ones(len(means), dtype=torch.long))


def train_probe(
    probe: Probe,
    learning_rate: float,
    steps: int,
    loss: Callable[[random.Random], Tensor],
    score: Callable[[], float],
    seed: int,
) -> float:
    """Trains a probe with Adam, restores its best weights, and returns their score.

    Args:
        probe: trained in place.
        learning_rate: constant.
        steps: updates.
        loss: returns the loss of a batch that it draws with the given generator.
        score: returns the score on valid; higher is better.
        seed: of the batches.
    """
    draw = random.Random(seed)
    optimizer = torch.optim.Adam(probe.parameters(), learning_rate)
    best, best_weights = None, {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(draw).backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)  # SUPERB's
        optimizer.step()
        if step % max(1, steps // CHECKS) == 0:
            with torch.no_grad():
                now = score()
            if best is None or now > best:
                best, best_weights = now, copy.deepcopy(probe.state_dict())
    assert best is not None  # steps is at least 1
    probe.load_state_dict(best_weights)
    return best


def best_of(
    learning_rates: Iterable[float], make: Callable[[], Probe], train: Callable[[Probe, float], float]
) -> tuple[float, float, Probe]:
    """Returns the highest score on valid with its learning rate and probe. The first wins a tie."""
    tried = []
    for learning_rate in learning_rates:
        probe = make()
        tried.append((train(probe, learning_rate), learning_rate, probe))
    return max(tried, key=lambda entry: entry[0])


def classify(task: Task, means: dict[str, Tensor], upstream: Any, seed: int) -> dict[str, Any]:
    """Trains and tests probes for a task with classes, one for each fold.

    Args:
        task: has classes.
        means: from `extract`.
        upstream: gives the shape of the hidden states.
        seed: of the head's initial weights and of the batches.

    Returns:
        {"test": accuracy, "resampled": its bootstrap, "valid": accuracy, "learning_rates": one for each fold,
        "layer_weights": their mean over the folds}.
    """
    index = {answer: number for number, answer in enumerate(task.classes)}
    hits, valid_scores, rates, weights = [], [], [], []
    for fold in task.folds:
        train, valid, test = (
            (
                torch.stack([means[recording.utterance] for recording, _ in part]),
                torch.tensor([index[answer] for _, answer in part]),
            )
            for part in (fold.train, fold.valid, fold.test)
        )
        score, rate, probe = best_on_means(
            *train,
            lambda: Probe(upstream, UtteranceLevel, len(index)),
            lambda _, outputs, answers: F.cross_entropy(outputs, answers),
            partial(_accuracy, part=valid),
            seed,
        )
        with torch.no_grad():
            hits += _hits(probe, test).tolist()
        valid_scores.append(score)
        rates.append(rate)
        weights.append(probe.layer_weights())
    return {
        "test": sum(hits) / len(hits),
        "resampled": bootstrap(len(hits), lambda times: times @ hits / len(hits)),
        "valid": sum(valid_scores) / len(valid_scores),
        "learning_rates": rates,
        "layer_weights": [sum(column) / len(column) for column in zip(*weights)],
    }


def best_on_means(
    x: Tensor,
    answers: Tensor,
    make: Callable[[], Probe],
    loss: Callable[[Any, Tensor, Tensor], Tensor],
    score: Callable[[Probe], float],
    seed: int,
) -> tuple[float, float, Probe]:
    """Returns `best_of` the LEARNING_RATES for probes of whole utterances.

    Args:
        x: means over time of the training recordings [n, layers, D].
        answers: their numbers [n].
        make: makes a probe.
        loss: of (probe, its outputs, answers).
        score: of a probe on valid; higher is better.
        seed: of the probe's initial weights and of the batches.
    """

    def seeded():
        torch.manual_seed(seed)
        return make()

    def train(probe, learning_rate):
        def batch_loss(draw):
            batch = draw.sample(range(len(x)), min(BATCH, len(x)))
            return loss(probe, of_means(probe, x[batch]), answers[batch])

        return train_probe(probe, learning_rate, STEPS, batch_loss, lambda: score(probe), seed)

    return best_of(LEARNING_RATES, seeded, train)


def _accuracy(probe, part):
    return _hits(probe, part).float().mean().item()


def _hits(probe, part):
    x, answers = part
    return of_means(probe, x).argmax(1) == answers
