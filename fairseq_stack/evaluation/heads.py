"""The probes: s3prl's weighted sum of the layers and SUPERB's linear heads, trained on stored features."""

import copy
import random

import sentencepiece
import torch
import torch.nn.functional as F
from s3prl.nn import Featurizer
from s3prl.nn.common import FrameLevel, UtteranceLevel
from torchaudio.functional import edit_distance

# One of them is chosen on valid, for each upstream, task, fold and seed.
LEARNING_RATES = (1e-3, 1e-2)
STEPS, BATCH = 400, 64
# s3prl's default for phoneme recognition, whose probe is of the same kind.
CTC_LEARNING_RATES = (1e-2,)
CTC_STEPS, CTC_BATCH = 1000, 16
CHECKS = 8  # how often a training looks at valid; the best of these moments counts, as in SUPERB


class Probe(torch.nn.Module):
    """A weighted sum of the layers and a linear head, both from s3prl.

    Args:
        upstream: for the number and the width of its hidden states.
        head: UtteranceLevel, whose mean pooling sees the stored means as utterances of one frame, or
            FrameLevel.
        outputs: number of classes.
    """

    def __init__(self, upstream, head, outputs):
        super().__init__()
        self.featurizer = Featurizer(upstream)
        self.head = head(self.featurizer.output_size, outputs)

    def forward(self, states, lengths):
        """`layers` times [B, T, D] and [B] frames to [B, outputs] or, frame by frame, [B, T, outputs]."""
        x, lengths = self.featurizer(states, [lengths] * len(states))
        outputs = self.head(x, lengths)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def layer_weights(self):
        """The weights of the hidden states in the sum: a list of numbers with the sum 1."""
        weights = getattr(self.featurizer, "weights", torch.zeros(1))  # s3prl weighs no single one
        return weights.softmax(0).tolist()


def train_probe(probe, learning_rate, steps, loss, score, seed):
    """Train a probe with Adam, and return it as it was when `score` was highest, with that score.

    Args:
        probe: a Probe.
        learning_rate: constant.
        steps: updates.
        loss: a function of a random.Random, which draws the batch.
        score: a function without arguments, on valid; higher is better.
        seed: of the batches.
    """
    draw = random.Random(seed)
    optimizer = torch.optim.Adam(probe.parameters(), learning_rate)
    best, kept = None, None
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(draw).backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)  # SUPERB's
        optimizer.step()
        if step % max(1, steps // CHECKS) == 0:
            with torch.no_grad():
                now = score()
            if best is None or now > best:
                best, kept = now, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(kept)
    return best


def best_of(learning_rates, make, train):
    """The probe with the highest score on valid: (score, learning rate, probe). The first wins a tie."""
    tried = []
    for learning_rate in learning_rates:
        probe = make()
        tried.append((train(probe, learning_rate), learning_rate, probe))
    return max(tried, key=lambda entry: entry[0])


def classify(task, means, upstream, seed):
    """Train probes for a task with classes, one for each fold, and ask them about the test recordings.

    Args:
        task: a Task.
        means: what `extract` gives.
        upstream: for its shape.
        seed: of the head's start and of the batches.

    Returns:
        {"test": accuracy, "valid": accuracy, "learning_rates": one for each fold, "layer_weights": their mean
        over the folds}.
    """
    index = {answer: number for number, answer in enumerate(task.classes)}
    right, valid, rates, weights = 0, [], [], []
    for fold in task.folds:
        parts = [
            (
                torch.stack([means[recording.utterance] for recording, _ in part]),
                torch.tensor([index[answer] for _, answer in part]),
            )
            for part in (fold.train, fold.valid, fold.test)
        ]
        score, rate, probe = _best_classifier(*parts[:2], upstream, len(index), seed)
        with torch.no_grad():
            right += round(_accuracy(probe, parts[2]) * len(fold.test))
        valid.append(score)
        rates.append(rate)
        weights.append(probe.layer_weights())
    return {
        "test": right / sum(len(fold.test) for fold in task.folds),
        "valid": sum(valid) / len(valid),
        "learning_rates": rates,
        "layer_weights": [sum(column) / len(column) for column in zip(*weights)],
    }


def _best_classifier(train, valid, upstream, classes, seed):
    """best_of for means [n, layers, D] and their answers [n]."""
    x, answers = train

    def make():
        torch.manual_seed(seed)
        return Probe(upstream, UtteranceLevel, classes)

    def train_one(probe, learning_rate):
        def loss(draw):
            batch = draw.sample(range(len(x)), min(BATCH, len(x)))
            return F.cross_entropy(_outputs(probe, x[batch]), answers[batch])

        return train_probe(probe, learning_rate, STEPS, loss, lambda: _accuracy(probe, valid), seed)

    return best_of(LEARNING_RATES, make, train_one)


def _outputs(probe, x):
    # [B, layers, D] as the layers of utterances of one frame.
    return probe(list(x.transpose(0, 1)[:, :, None]), torch.ones(len(x), dtype=torch.long))


def _accuracy(probe, part):
    x, answers = part
    return (_outputs(probe, x).argmax(1) == answers).float().mean().item()


def train_units(texts, prefix, size=60):
    """Train sentencepiece's unigram units on texts, and return the processor.

    Args:
        texts: list of lower-case texts.
        prefix: where to write the model: prefix.model and prefix.vocab.
        size: units at most; fewer where the texts do not yield as many.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        vocab_size=size,
        hard_vocab_limit=False,
        model_type="unigram",
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def recognize(task, frames, upstream, units, seed):
    """Train a CTC probe on units of text, and let it transcribe the test recordings.

    Args:
        task: a Task whose answers are texts.
        frames: what `extract` gives.
        upstream: for its shape.
        units: a SentencePieceProcessor. CTC's blank is the class behind its last unit.
        seed: of the head's start and of the batches.

    Returns:
        {"test": character error rate, "valid": the same, "test_wer": word error rate, "learning_rates": [the
        chosen one], "layer_weights": list}.
    """
    (fold,) = task.folds
    blank = units.get_piece_size()
    parts = [
        [(frames[recording.utterance], torch.tensor(units.encode(text)), text) for recording, text in part]
        for part in (fold.train, fold.valid, fold.test)
    ]
    # CTC needs a frame for each unit, and one between two that are equal.
    parts[0] = [
        (x, target, text)
        for x, target, text in parts[0]
        if len(target) + int((target[1:] == target[:-1]).sum()) <= x.size(1)
    ]
    # Neighbours by length make a batch, which spares most of the padding.
    parts[0].sort(key=lambda entry: entry[0].size(1))

    def log_probabilities(probe, batch):
        lengths = torch.tensor([x.size(1) for x, _, _ in batch])
        padded = torch.zeros(len(batch), batch[0][0].size(0), int(lengths.max()), batch[0][0].size(2))
        for row, (x, _, _) in enumerate(batch):
            padded[row, :, : x.size(1)] = x
        return probe(list(padded.transpose(0, 1)), lengths).log_softmax(2), lengths

    def transcripts(probe, part):
        found = []
        for begin in range(0, len(part), CTC_BATCH):
            scores, lengths = log_probabilities(probe, part[begin : begin + CTC_BATCH])
            for best, length in zip(scores.argmax(2), lengths):
                path = best[:length].unique_consecutive()
                found.append(units.decode(path[path != blank].tolist()))
        return found

    def error_rate(probe, part, split):
        pairs = list(zip(transcripts(probe, part), (text for _, _, text in part)))
        errors = sum(edit_distance(split(found), split(wanted)) for found, wanted in pairs)
        return errors / sum(len(split(wanted)) for _, wanted in pairs)

    def make():
        torch.manual_seed(seed)
        return Probe(upstream, FrameLevel, blank + 1)

    def train(probe, learning_rate):
        def loss(draw):
            begin = draw.randrange(max(1, len(parts[0]) - CTC_BATCH + 1))
            batch = parts[0][begin : begin + CTC_BATCH]
            scores, lengths = log_probabilities(probe, batch)
            targets = [target for _, target, _ in batch]
            sizes = torch.tensor([len(target) for target in targets])
            return F.ctc_loss(scores.transpose(0, 1), torch.cat(targets), lengths, sizes, blank)

        return train_probe(probe, learning_rate, CTC_STEPS, loss, lambda: -error_rate(probe, parts[1], list), seed)

    score, rate, probe = best_of(CTC_LEARNING_RATES, make, train)
    with torch.no_grad():
        return {
            "test": error_rate(probe, parts[2], list),
            "valid": -score,
            "test_wer": error_rate(probe, parts[2], str.split),
            "learning_rates": [rate],
            "layer_weights": probe.layer_weights(),
        }
