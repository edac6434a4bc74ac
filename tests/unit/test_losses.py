"""Losses, target normalisation and masks, each against a slow version written out frame by frame."""

import math

import pytest
import torch
from fairseq.criterions.hubert_criterion import HubertCriterion

from fairseq_stack.criterions.losses import (
    LOSSES,
    cross_entropy,
    l1_cosine,
    mse,
    normalize_targets,
    predicted_right,
    temporal_gram,
    valid_frames,
)
from fairseq_stack.data.masking import span_mask

FRAMES = [7, 4, 1]


def states(width, seed):
    """[3, 7, width]; padding holds numbers too, which must not count."""
    return torch.randn(3, 7, width, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = states(5, 0), states(5, 1)
VALID = valid_frames(torch.tensor(FRAMES), 7)


def slow_frame(name, prediction, target):
    """One frame: two lists of floats."""
    width = len(target)
    if name == "mse":
        return sum((p - t) ** 2 for p, t in zip(prediction, target)) / width
    absolute = sum(abs(p - t) for p, t in zip(prediction, target)) / width
    if name == "l1":
        return absolute
    norms = math.sqrt(sum(p * p for p in prediction)) * math.sqrt(sum(t * t for t in target))
    cosine = sum(p * t for p, t in zip(prediction, target)) / norms
    return absolute - math.log(1 / (1 + math.exp(-cosine)))


def slow_gram(student_input, student_output, teacher_input, teacher_output):
    """One utterance: four lists of frames, each a list of floats."""
    frames, total = len(student_output), 0.0

    def relation(one, other):
        return sum(a * b for a, b in zip(one, other)) / len(one)

    for i in range(frames):
        for j in range(frames):
            layer_wise = relation(student_output[i], student_output[j])
            layer_wise -= relation(teacher_output[i], teacher_output[j])
            intra_layer = relation(student_input[i], student_output[j])
            intra_layer -= relation(teacher_input[i], teacher_output[j])
            total += layer_wise**2 + intra_layer**2
    return frames * total / frames**2


def every_loss():
    """Each loss as a function of rows of the batch and their padding, and its slow value."""
    prediction, target = STUDENT.double().tolist(), TEACHER.double().tolist()
    for name, loss in ((name, loss.function) for name, loss in LOSSES.items() if loss.heads and not loss.codes):
        slow = [
            sum(slow_frame(name, prediction[row][frame], target[row][frame]) for frame in range(count))
            for row, count in enumerate(FRAMES)
        ]
        yield pytest.param(loss, (STUDENT, TEACHER), slow, id=name)
    inputs = (states(3, 2), states(3, 3), states(8, 4), states(8, 5))  # a narrow student, a wide teacher
    rows = [slow_gram(*(each[row, :count].double().tolist() for each in inputs)) for row, count in enumerate(FRAMES)]
    yield pytest.param(temporal_gram, inputs, rows, id="temporal_gram")


@pytest.mark.parametrize("loss, inputs, slow", list(every_loss()))
class TestEveryLoss:
    def test_equals_its_definition_in_float64(self, loss, inputs, slow):
        assert loss(*inputs, VALID).item() == pytest.approx(sum(slow), rel=1e-5)

    def test_does_not_see_padding(self, loss, inputs, slow):
        inputs = [each.masked_fill(~VALID[:, :, None], math.nan).requires_grad_() for each in inputs]
        value = loss(*inputs, VALID)
        value.backward()
        assert value.item() == pytest.approx(sum(slow), rel=1e-5)
        for each in inputs:
            assert each.grad[VALID].any() and not each.grad[~VALID].any()

    def test_of_a_batch_is_the_sum_over_its_utterances(self, loss, inputs, slow):
        for row, count in enumerate(FRAMES):
            alone = [each[row : row + 1, :count] for each in inputs]
            assert loss(*alone, VALID[row : row + 1, :count]).item() == pytest.approx(slow[row], rel=1e-5)

    def test_is_computed_in_fp32_under_autocast_and_for_half_precision(self, loss, inputs, slow):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(*inputs, VALID).item() == pytest.approx(sum(slow), rel=1e-5)
        half = [each.half() for each in inputs]
        expected = loss(*(each.double().float() for each in half), VALID).item()
        assert loss(*half, VALID).item() == pytest.approx(expected, rel=1e-6)


def test_every_name_of_the_configuration_is_tested_above():
    assert {param.id for param in every_loss()} | {"units", "codes"} == set(LOSSES)


LOGITS = 3 * states(2 * 5, 7)  # of two codebooks with five entries
CODES = torch.randint(5, (3, 7, 2), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


def slow_entropy(row, frame):
    """The mean over the codebooks of one frame, in float64."""
    logits = LOGITS[row, frame].double().tolist()
    total = 0.0
    for book, code in enumerate(CODES[row, frame].tolist()):
        of_book = logits[5 * book : 5 * book + 5]
        total += math.log(sum(math.exp(value) for value in of_book)) - of_book[code]
    return total / 2


def test_the_cross_entropy_of_codes_equals_its_definition_in_float64_and_does_not_see_padding():
    expected = [sum(slow_entropy(row, frame) for frame in range(count)) for row, count in enumerate(FRAMES)]
    logits = LOGITS.masked_fill(~VALID[:, :, None], math.nan).requires_grad_()
    value = cross_entropy(logits, CODES, VALID)
    value.backward()
    assert value.item() == pytest.approx(sum(expected), rel=1e-5)
    assert logits.grad[VALID].any() and not logits.grad[~VALID].any()
    for row, count in enumerate(FRAMES):
        alone = (each[row : row + 1, :count] for each in (LOGITS, CODES, VALID))
        assert cross_entropy(*alone).item() == pytest.approx(expected[row], rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_entropy(LOGITS, CODES, VALID).item() == pytest.approx(sum(expected), rel=1e-5)
    half = LOGITS.half()
    assert cross_entropy(half, CODES, VALID).item() == pytest.approx(cross_entropy(half.float(), CODES, VALID).item())


def test_the_accuracy_counts_the_codes_that_are_most_probable():
    guesses = LOGITS.unflatten(2, (2, 5)).argmax(3)
    right = sum((guesses[row, frame] == CODES[row, frame]).sum().item() / 2 for row, frame in VALID.nonzero().tolist())
    assert predicted_right(LOGITS, CODES, VALID).item() == pytest.approx(right) and right > 0


class OfLogits(torch.nn.Module):
    """What fairseq's criterion asks a HuBERT for."""

    def forward(self, target_list, **net_input):
        return {"units": target_list, **net_input}

    def get_logits(self, net, masked):
        return [net["logits"][net["masked"] if masked else net["unmasked"]]]

    def get_targets(self, net, masked):
        return [net["units"][net["masked"] if masked else net["unmasked"]]]


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_on_the_same_logits_units_have_the_loss_and_gradient_of_fairseqs_hubert_criterion(unmasked_weight):
    units, masked = CODES[:, :, :1].long(), VALID & (torch.arange(7) % 2 == 0)
    theirs = states(5, 9).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    criterion = HubertCriterion(None, 1.0, unmasked_weight)
    net_input = {"logits": theirs, "masked": masked, "unmasked": VALID & ~masked}
    sample = {"id": torch.arange(3), "target_list": units[:, :, 0], "net_input": net_input}
    expected, _, log = criterion(OfLogits(), sample)
    # As LayerDistillation weights masked and unmasked frames.
    everywhere, on_masked = (cross_entropy(ours, units, frames) for frames in (VALID, masked))
    loss = unmasked_weight * everywhere + (1 - unmasked_weight) * on_masked
    torch.testing.assert_close(loss, expected)
    assert on_masked.item() == pytest.approx(log["loss_m_0"]) and log["loss_u_0"] > 0
    expected.backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_weight_of_the_cosine_is_its_weight():
    l1_alone, once, thrice = (l1_cosine(STUDENT, TEACHER, VALID, weight).item() for weight in (0.0, 1.0, 3.0))
    assert thrice - l1_alone == pytest.approx(3 * (once - l1_alone), rel=1e-5)


def test_a_square_that_does_not_fit_into_half_precision_is_exact():
    prediction, target = torch.full((1, 1, 2), 300.0).half(), torch.zeros(1, 1, 2).half()
    assert mse(prediction, target, torch.ones(1, 1, dtype=torch.bool)).item() == 90_000.0


def test_gram_matrices_do_not_see_a_rotation_of_the_features():
    before, after = states(5, 2), states(5, 3)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(6)))
    assert temporal_gram(before @ rotation, after @ rotation, before, after, VALID).item() < 1e-9
    assert temporal_gram(before, after @ rotation, before, after, VALID).item() > 0.1


def slow_normalize(values):
    """A list of floats to zero mean and unit variance."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [(value - mean) / deviation for value in values]


@pytest.mark.parametrize("how", ["layer_norm", "instance_norm"])
def test_targets_are_normalised_over_features_or_over_the_frames_of_an_utterance(how):
    target = (3 * TEACHER + 2).masked_fill(~VALID[:, :, None], math.nan)
    normalized = normalize_targets(target, VALID, how)
    for row, count in enumerate(FRAMES):
        frames = target[row, :count].double().tolist()
        if how == "layer_norm":
            expected = [slow_normalize(frame) for frame in frames]
        else:
            expected = list(zip(*(slow_normalize(feature) for feature in zip(*frames))))
        torch.testing.assert_close(normalized[row, :count], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_targets_stay_as_they_are_without_normalisation():
    assert normalize_targets(TEACHER, VALID, "none") is TEACHER


COUNTS = torch.tensor([200, 200, 37, 1, 2])


def seeds(update):
    return [(1, update, utterance) for utterance in range(len(COUNTS))]


def test_a_mask_depends_on_its_seeds_alone():
    torch.manual_seed(0)
    mask = span_mask(COUNTS, 0.65, 10, seeds(3))
    torch.manual_seed(1)
    assert torch.equal(mask, span_mask(COUNTS, 0.65, 10, seeds(3)))
    assert not torch.equal(mask, span_mask(COUNTS, 0.65, 10, seeds(4)))
    assert not torch.equal(mask[0], mask[1])
    # Nor does it depend on what else is in the batch.
    assert torch.equal(mask[2:3, :37], span_mask(COUNTS[2:3], 0.65, 10, seeds(3)[2:3]))


def test_a_mask_is_made_of_whole_spans_inside_the_utterance():
    mask = span_mask(COUNTS, 0.3, 10, seeds(0))
    assert mask.shape == (5, 200) and not (mask & ~valid_frames(COUNTS, 200)).any()
    runs = "".join("x" if frame else " " for frame in mask[0].tolist()).split()
    assert runs and all(len(run) >= 10 for run in runs)
    assert not mask[3].any()  # one frame cannot be masked and heard


def test_the_masked_share_is_the_probability_less_the_overlap():
    # n p / l starts spread over n frames leave a frame unmasked with probability about (1 - p / l) ** l.
    many = span_mask(torch.full((200,), 500), 0.65, 10, [(7, row) for row in range(200)])
    assert many.float().mean().item() == pytest.approx(1 - (1 - 0.065) ** 10, abs=0.01)
    assert not span_mask(COUNTS, 0.0, 10, seeds(0)).any()
