"""Muon is what its authors describe, and updates the matrices of the student's hidden layers."""

import pytest
import torch
from conftest import LINKED, TINY
from fairseq.optim.adam import Adam
from omegaconf import OmegaConf
from training import tiny, train

from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.training.muon import Muon, mark_matrices, orthogonalized

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def weights(seed):
    """Two tall matrices, two wide ones, a kernel and two biases."""
    torch.manual_seed(seed)
    shapes = [(6, 4), (6, 4), (4, 9), (4, 9), (5, 4, 3), (6,), (4,)]
    return [torch.randn(shape) for shape in shapes]


def reference(parameter, gradients):
    """A matrix after updates with these gradients, in float64 and one step of the formulas after the other."""
    x, average = parameter.double().flatten(1), torch.zeros(parameter.flatten(1).shape, dtype=torch.float64)
    for gradient in gradients:
        gradient = gradient.double().flatten(1)
        average = 0.95 * average + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * average
        update = update / torch.linalg.matrix_norm(update)
        for _ in range(5):
            square = update @ update.T
            update = 3.4445 * update - 4.7750 * square @ update + 2.0315 * square @ square @ update
        x = x - 0.01 * 0.1 * x - 0.01 * 0.2 * max(x.shape) ** 0.5 * update
    return x.view_as(parameter)


def updated(optimizer, parameters, gradients):
    for number in range(3):
        for parameter, steps in zip(parameters, gradients):
            parameter.grad = None if steps is None else steps[number].clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_matrices_are_updated_by_muon_and_the_rest_as_by_fairseqs_adam():
    start = weights(0)
    gradients = [[weights(seed)[index] for seed in (1, 2, 3)] for index in range(len(start))]
    parameters = [torch.nn.Parameter(value.clone()) for value in start]
    mark_matrices(parameters[:5])
    found = updated(Muon(parameters, momentum=0.95, **OPTIONS), parameters, gradients)
    for value, steps, muon in zip(start[:5], gradients, found):
        torch.testing.assert_close(muon, reference(value, steps).float(), rtol=1e-4, atol=1e-5)
    others = [torch.nn.Parameter(value.clone()) for value in start[5:]]
    for value, expected in zip(found[5:], updated(Adam(others, **OPTIONS), others, gradients[5:])):
        torch.testing.assert_close(value, expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs a torch that has Muon, 2.9 or later")
def test_matrices_are_updated_as_by_torchs_muon_but_for_its_bf16():
    start, (one, other, *_) = weights(0), zip(weights(1), weights(2), weights(3))
    results = []
    for make in (
        lambda parameters: Muon(parameters, momentum=0.95, **OPTIONS),
        lambda parameters: torch.optim.Muon(parameters, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        parameters = [torch.nn.Parameter(value.clone()) for value in start[:2]]
        mark_matrices(parameters)
        results.append(updated(make(parameters), parameters, [one, other]))
    for value, ours, theirs in zip(start, *results):
        assert (ours - theirs).norm() < 0.02 * (theirs - value).norm()


def test_a_matrix_without_a_gradient_stays_and_one_of_zeros_decays_alone():
    parameters = [torch.nn.Parameter(value) for value in weights(0)[:2]]
    mark_matrices(parameters)
    before = [value.detach().clone() for value in parameters]
    zeros = [torch.zeros(6, 4)] * 3
    found = updated(Muon(parameters, momentum=0.95, **OPTIONS), parameters, [None, zeros])
    assert torch.equal(found[0], before[0])
    torch.testing.assert_close(found[1], before[1] * (1 - 0.001) ** 3)


def test_singular_values_move_to_about_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (3, 50, 20)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("frozen", [False, True])
def test_the_student_gives_muon_the_matrices_between_its_hidden_layers(frozen):
    fields = {**TINY, **LINKED, "encoder_layers": 1, "stack_stages": 1, "mask_prob": 0.5, "head_inner_dim": 4}
    cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), fields, {"feature_grad_mult": float(not frozen)})
    model = StackedHubert(cfg, {4: 16}, teacher_depth=4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    cnn = [f"feature_extractor.conv_layers.{number}.0.weight" for number in range(1, 7)]
    attention = [f"encoder.layers.0.self_attn.{part}_proj.weight" for part in "kvq"]
    assert [names[parameter] for parameter in model.matrices()] == [
        *([] if frozen else cnn),
        "post_extract_proj.weight",
        *attention,
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.0.fc1.weight",
        "encoder.layers.0.fc2.weight",
    ]


def test_half_precision_without_masters_is_refused_in_a_line(speech, teacher_file, tmp_path):
    fields = {"common.bf16": True, "common.memory_efficient_bf16": True, "optimizer._name": "muon"}
    with pytest.raises(SystemExit, match="^error: .*memory_efficient_bf16=true.* optimizer._name=muon"):
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
