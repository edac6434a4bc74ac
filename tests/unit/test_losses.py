"""Losses count valid frames only, whatever the batch looks like."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from conftest import TINY
from fairseq_stack.criterions.layer_distillation import LayerDistillation, LayerDistillationConfig
from fairseq_stack.losses import mse, valid_frames
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig

LENGTHS = [4000, 3000, 1200, 720]


def test_mse_is_the_mean_over_features_summed_over_valid_frames():
    prediction, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    frames = torch.tensor([5, 2])
    expected = 0.0
    for row in range(2):
        for frame in range(int(frames[row])):
            difference = (prediction[row, frame] - target[row, frame]).double()
            expected += float((difference**2).sum() / 3)
    assert mse(prediction, target, valid_frames(frames, 5)).item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_inputs_are_compared_in_fp32():
    # 300 squared does not fit into fp16.
    prediction, target = torch.full((1, 1, 2), 300.0).half(), torch.zeros(1, 1, 2).half()
    assert mse(prediction, target, torch.ones(1, 1, dtype=torch.bool)).item() == 90_000.0


def make_student():
    cfg = OmegaConf.merge(
        OmegaConf.structured(StackedHubertConfig),
        {**TINY, "dropout": 0.0, "attention_dropout": 0.0, "teacher_layers": [4, 8, 12], "max_update": 1000},
    )
    torch.manual_seed(0)
    return StackedHubert(cfg, {4: 6, 8: 6, 12: 6}, teacher_depth=12)


def make_criterion(**fields):
    cfg = OmegaConf.merge(OmegaConf.structured(LayerDistillationConfig), fields)
    return LayerDistillation.build_criterion(cfg, SimpleNamespace(teacher=SimpleNamespace(depth=12)))


def make_batch(rows):
    generator = torch.Generator().manual_seed(5)
    waveforms = [torch.randn(length, generator=generator) for length in LENGTHS]
    targets = {layer: [torch.randn(12, 6, generator=generator) for _ in LENGTHS] for layer in (4, 8, 12)}
    chosen = [waveforms[row] for row in rows]
    student_frames = make_student().frames(max(LENGTHS[row] for row in rows))
    return {
        "waveforms": torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True),
        "lengths": torch.tensor([LENGTHS[row] for row in rows]),
        # Frames beyond an utterance's end hold numbers too: they must not count.
        "targets": {layer: torch.stack([target[row][:student_frames] for row in rows]) for layer, target in targets.items()},
    }


def test_the_loss_is_output_plus_weighted_mean_of_the_intermediate_layers():
    student, batch = make_student(), make_batch([0])
    loss, sample_size, log = make_criterion(intermediate_weight=0.25)(student, batch)
    predictions = student(batch["waveforms"], batch["lengths"])["predictions"]
    terms = {
        layer: float((predictions[layer].double() - batch["targets"][layer].double()).pow(2).mean())
        for layer in (4, 8, 12)
    }
    assert sample_size == 12
    assert loss.item() / sample_size == pytest.approx(terms[12] + 0.25 * sum(terms.values()) / 3, rel=1e-5)
    for layer in (4, 8, 12):
        assert float(log[f"layer_{layer}"]) / sample_size == pytest.approx(terms[layer], rel=1e-5)
    assert float(log["depth"]) / sample_size == 3 and float(log["stage"]) / sample_size == 1
    norm = batch["targets"][12].double().norm(dim=-1).mean()
    assert float(log["teacher_norm"]) / sample_size == pytest.approx(float(norm), rel=1e-5)


def test_one_big_batch_and_several_small_ones_give_the_same_gradient():
    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]):
        student, criterion, frames = make_student(), make_criterion(), 0
        for rows in parts:
            loss, sample_size, _ = criterion(student, make_batch(rows))
            loss.backward()
            frames += sample_size
        gradients.append({name: value.grad / frames for name, value in student.named_parameters() if value.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


def test_without_intermediate_weight_only_the_last_layer_teaches():
    student = make_student()
    loss, _, _ = make_criterion(intermediate_weight=0.0)(student, make_batch([0, 1]))
    loss.backward()
    assert student.heads["12"].weight.grad.any() and not student.heads["4"].weight.grad.any()


def test_a_negative_weight_is_refused():
    with pytest.raises(SystemExit, match="criterion.intermediate_weight=-1.0 must be 0 or more"):
        make_criterion(intermediate_weight=-1.0)
