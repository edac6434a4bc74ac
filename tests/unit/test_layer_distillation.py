"""The criterion: what is added up, with which weights, from which hidden states."""

from types import SimpleNamespace

import pytest
import torch
from conftest import LINKED, TINY
from omegaconf import OmegaConf

from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.criterions.layer_distillation import (
    LayerDistillation,
    LayerDistillationConfig,
)
from fairseq_stack.criterions.losses import normalize_targets, temporal_gram
from fairseq_stack.data.masking import span_mask
from fairseq_stack.errors import InputError
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.tasks.speech_distillation import SpeechDistillation

LENGTHS = [4000, 3000, 1200, 720]
TEACHER = SimpleNamespace(name="teacher.pt", depth=12, width=6)


def build(mask_prob=0.0, head_inner_dim=0, **fields):
    """A student and a criterion that share their fields, as one YAML gives them."""
    cfg = OmegaConf.merge(OmegaConf.structured(LayerDistillationConfig), fields)
    linked = {name: cfg[name] for name in ("loss", "teacher_layers", "intermediate_style", "output_weight")}
    student_cfg = OmegaConf.merge(
        OmegaConf.structured(StackedHubertConfig),
        {**TINY, "dropout": 0.0, "attention_dropout": 0.0, "head_inner_dim": head_inner_dim},
        {**LINKED, **linked, "mask_prob": mask_prob},
    )
    task = SimpleNamespace(teacher=TEACHER, codebook_shape=(2, 3))  # as many logits as the teacher has features
    torch.manual_seed(0)
    return StackedHubert.build_model(student_cfg, task), LayerDistillation.build_criterion(cfg, task)


def make_batch(rows, layers=(4, 8, 12)):
    """Utterances of different lengths; frames beyond their ends hold numbers too, which must not count."""
    generator = torch.Generator().manual_seed(5)
    waveforms = [torch.randn(length, generator=generator) for length in LENGTHS]
    targets = {layer: [torch.randn(12, 6, generator=generator) for _ in LENGTHS] for layer in layers}
    chosen = [waveforms[row] for row in rows]
    frames = build()[0].frames(max(LENGTHS[row] for row in rows))
    return {
        "waveforms": torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True),
        "lengths": torch.tensor([LENGTHS[row] for row in rows]),
        "targets": {layer: torch.stack([each[row][:frames] for row in rows]) for layer, each in targets.items()},
    }


def masked_batch(rows):
    batch = make_batch(rows)
    frames = build()[0].frames(batch["lengths"])
    return {**batch, "mask": span_mask(frames, 0.5, 3, [(row,) for row in rows])}


def squared_errors(predictions, targets):
    """[B, T] in float64."""
    return (predictions.double() - targets.double()).pow(2).mean(-1)


def test_the_loss_is_output_plus_weighted_mean_of_the_intermediate_layers():
    (student, criterion), batch = build(intermediate_weight=0.25, output_weight=2.0), make_batch([0])
    loss, sample_size, log = criterion(student, batch)
    with torch.no_grad():
        predictions = student(batch["waveforms"], batch["lengths"])["predictions"]
    targets = batch["targets"]
    terms = {layer: float(squared_errors(predictions[layer], targets[layer]).mean()) for layer in (4, 8, 12)}
    assert sample_size == 12
    assert loss.item() / sample_size == pytest.approx(2 * terms[12] + 0.25 * sum(terms.values()) / 3, rel=1e-5)
    for layer in (4, 8, 12):
        assert float(log[f"layer_{layer}"]) / sample_size == pytest.approx(terms[layer], rel=1e-5)
    assert float(log["depth"]) / sample_size == 3 and float(log["stage"]) / sample_size == 1
    norm = batch["targets"][12].double().norm(dim=-1).mean()
    assert float(log["teacher_norm"]) / sample_size == pytest.approx(float(norm), rel=1e-5)


STAR = {"loss": "temporal_gram", "intermediate_weight": 1.0, "output_weight": 0.0}
STAR_LAYERS = (3, 4, 7, 8, 11, 12)
RECIPES = {
    "the defaults": {},
    "DistilHuBERT": {"loss": "l1_cosine", "intermediate_style": "prediction", "output_weight": 0.0},
    "normalised targets": {"loss": "l1", "target_normalization": "instance_norm"},
    "STaR": STAR,
    "masked": {"mask_prob": 0.5, "unmasked_weight": 0.5},
    "units of masked frames": {"loss": "codes", "mask_prob": 0.5, "unmasked_weight": 0.0},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_big_batch_and_several_small_ones_give_the_same_gradient(recipe):
    def batch(rows):
        made = masked_batch(rows) if "mask_prob" in RECIPES[recipe] else make_batch(rows, (*STAR_LAYERS,))
        if "loss" in RECIPES[recipe] and RECIPES[recipe]["loss"] == "codes":
            made["targets"] = {layer: (states[:, :, :2].abs() % 3).byte() for layer, states in made["targets"].items()}
        return made

    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]):
        (student, criterion), frames = build(**RECIPES[recipe]), 0
        for rows in parts:
            loss, sample_size, _ = criterion(student, batch(rows))
            loss.backward()
            frames += sample_size
        learning = [(name, value) for name, value in student.named_parameters() if value.grad is not None]
        gradients.append({name: value.grad / frames for name, value in learning})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


def test_without_intermediate_weight_only_the_last_layer_teaches():
    student, criterion = build(intermediate_weight=0.0)
    loss, _, _ = criterion(student, make_batch([0, 1]))
    loss.backward()
    assert student.heads["12"].weight.grad.any() and not student.heads["4"].weight.grad.any()


def test_without_output_weight_only_the_chosen_layers_teach_and_have_heads():
    student, criterion = build(teacher_layers=[4, 8], output_weight=0.0)
    assert set(student.heads) == {"4", "8"} and criterion.target_layers == [4, 8]
    batch = make_batch([0, 1], layers=(4, 8))
    loss, sample_size, log = criterion(student, batch)
    assert loss.item() == pytest.approx(0.5 * float(log["intermediate_loss"]), rel=1e-6)
    assert "output_loss" not in log and "layer_12" not in log


def test_predictions_come_from_the_last_layer_in_every_stage():
    student, criterion = build(intermediate_style="prediction", teacher_layers=[5, 11])
    assert set(student.heads) == {"5", "11", "12"} and criterion.target_layers == [5, 11, 12]
    batch = make_batch([0])
    for stage in (1, 2):
        student.grow_to(stage)
        net = student(batch["waveforms"], batch["lengths"])
        for layer, head in student.heads.items():
            assert torch.equal(net["predictions"][int(layer)], head(net["hidden_states"][-1]))


def test_a_student_shallower_than_its_predictions_still_trains():
    student, criterion = build(intermediate_style="prediction", teacher_layers=[1, 2, 3, 5, 7], head_inner_dim=9)
    assert [tuple(weight.shape) for weight in student.heads["5"].parameters()] == [(9, 16), (9,), (6, 9), (6,)]
    loss, _, _ = criterion(student, make_batch([0], layers=(1, 2, 3, 5, 7, 12)))
    loss.backward()
    assert student.heads["5"][0].weight.grad.any()


def test_a_checkpoint_with_deep_heads_gives_back_its_student():
    student, _ = build(head_inner_dim=9)
    state = {"model": student.state_dict(), "cfg": {"model": {**LINKED, **TINY, "head_inner_dim": 9}}}
    loaded = StackedHubert.from_checkpoint(state)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in student.state_dict().items())
    fresh = loaded.at_initialisation().state_dict()
    assert {name: value.shape for name, value in fresh.items()} == {
        name: value.shape for name, value in loaded.state_dict().items()
    }


def test_heads_whose_positions_a_checkpoint_does_not_tell_stay_behind():
    student, _ = build(teacher_layers=[4, 8], output_weight=0.0)
    cfg = {**LINKED, **TINY, "teacher_layers": [4, 8], "output_weight": 0.0}
    loaded = StackedHubert.from_checkpoint({"model": student.state_dict(), "cfg": {"model": cfg}})
    batch = make_batch([0])
    with torch.no_grad():
        ours, theirs = student(batch["waveforms"], batch["lengths"]), loaded(batch["waveforms"], batch["lengths"])
    assert set(ours["predictions"]) == {4, 8} and not theirs["predictions"]
    assert torch.equal(ours["hidden_states"][-1], theirs["hidden_states"][-1])


def test_targets_are_normalised_before_they_are_compared():
    batch = make_batch([0, 1])
    (student, criterion), (_, plain) = build(target_normalization="layer_norm"), build()
    valid = torch.ones(2, 12, dtype=torch.bool)
    targets = batch["targets"].items()
    normalized = {layer: normalize_targets(target, valid, "layer_norm") for layer, target in targets}
    expected, _, _ = plain(student, {**batch, "targets": normalized})
    assert criterion(student, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert plain(student, batch)[0].item() != pytest.approx(expected.item(), rel=1e-2)


def test_temporal_relations_are_those_of_one_layer_of_each_at_the_same_relative_depth():
    student, criterion = build(**STAR)
    assert not student.heads and criterion.target_layers == [3, 4, 7, 8, 11, 12]
    batch = make_batch([0], layers=criterion.target_layers)
    for stage, positions in ((1, {4: 1, 8: 2, 12: 3}), (2, {4: 2, 8: 4, 12: 6})):
        student.grow_to(stage)
        loss, _, log = criterion(student, batch)
        states, targets = student(batch["waveforms"], batch["lengths"])["hidden_states"], batch["targets"]
        total = 0.0
        for layer, position in positions.items():
            pairs = states[position - 1], states[position], targets[layer - 1], targets[layer]
            term = temporal_gram(*pairs, torch.ones(1, 12, dtype=torch.bool))
            assert float(log[f"layer_{layer}"]) == pytest.approx(term.item(), rel=1e-6)
            total += term.item() / 3
        assert loss.item() == pytest.approx(total, rel=1e-6)


def test_masked_frames_are_hidden_from_the_student_and_the_others_are_weighed_apart():
    (student, criterion), batch = build(mask_prob=0.5, unmasked_weight=0.25), masked_batch([0, 1])
    loss, sample_size, log = criterion(student, batch)
    with torch.no_grad():
        net = student(batch["waveforms"], batch["lengths"], batch["mask"])
    sums = {"masked_loss": 0.0, "unmasked_loss": 0.0}
    for row, frames in enumerate(net["frames"].tolist()):
        for layer, weight in ((4, 0.5 / 3), (8, 0.5 / 3), (12, 1 + 0.5 / 3)):
            errors = squared_errors(net["predictions"][layer], batch["targets"][layer])[row]
            for frame in range(frames):
                name = "masked_loss" if batch["mask"][row, frame] else "unmasked_loss"
                sums[name] += weight * float(errors[frame])
    assert loss.item() == pytest.approx(sums["masked_loss"] + 0.25 * sums["unmasked_loss"], rel=1e-5)
    for name, value in sums.items():
        assert float(log[name]) == pytest.approx(value, rel=1e-5)
    assert log["masked_share"] == int(batch["mask"].sum()) and 0 < log["masked_share"] < sample_size


def test_the_student_does_not_hear_a_masked_frame():
    student, _ = build(mask_prob=0.5)
    waveforms, lengths = make_batch([0])["waveforms"], torch.tensor([LENGTHS[0]])

    def heard(waveforms, masked):
        return student(waveforms, lengths, torch.full((1, 12), masked))["hidden_states"][-1]

    assert torch.equal(heard(waveforms, True), heard(-waveforms, True))
    assert not torch.allclose(heard(waveforms, False), heard(-waveforms, False))


def test_a_student_that_is_never_masked_has_no_mask_embedding():
    assert hasattr(build(mask_prob=0.1)[0], "mask_emb") and not hasattr(build()[0], "mask_emb")


def test_the_mask_embedding_and_the_heads_stay_behind_in_an_export():
    student, _ = build(mask_prob=0.5)
    cfg = {**OmegaConf.to_container(student.cfg), "_name": "stacked_hubert"}
    state = {"model": student.state_dict(), "cfg": {"model": cfg, "task": {"normalize": False}}}
    names = student_from_checkpoint(state).weights.keys()
    expected = {name for name, _ in student.named_parameters() if not name.startswith(("mask_emb", "heads."))}
    idle = {name for name in expected if name.startswith("encoder.layers.") and int(name.split(".")[2]) > 2}
    assert "mask_emb" in state["model"] and names == expected - idle


def test_masked_and_unmasked_losses_are_logged_as_means_over_their_frames():
    from fairseq.logging import metrics

    logs = [
        {"loss": 6.0, "masked_loss": 4.0, "unmasked_loss": 2.0, "masked_share": 2, "sample_size": 10},
        {"loss": 8.0, "masked_loss": 5.0, "unmasked_loss": 3.0, "masked_share": 4, "sample_size": 10},
    ]
    with metrics.aggregate(new_root=True) as logged:
        LayerDistillation.reduce_metrics(logs)
    values = {name: round(float(value), 4) for name, value in logged.get_smoothed_values().items()}
    assert values == {"loss": 0.7, "masked_loss": 1.5, "unmasked_loss": 0.3571, "masked_share": 0.3}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss": "huber"}, "criterion.loss=huber is unknown; choose from mse, l1, l1_cosine, temporal_gram"),
        ({"intermediate_style": "heads"}, "criterion.intermediate_style=heads is unknown; choose from layer_to"),
        ({"target_normalization": "batch"}, "criterion.target_normalization=batch is unknown; choose from none"),
        ({"intermediate_weight": -1.0}, "criterion.intermediate_weight=-1.0 must be 0 or more"),
        ({"output_weight": -1.0}, "criterion.output_weight=-1.0 must be 0 or more"),
        ({"unmasked_weight": -1.0}, "criterion.unmasked_weight=-1.0 must be 0 or more"),
        ({"cosine_weight": -1.0}, "criterion.cosine_weight=-1.0 must be 0 or more"),
        ({"output_weight": 0.0, "intermediate_weight": 0.0}, "=0 and criterion.intermediate_weight=0 leave nothing"),
        (
            {"output_weight": 0.0, "teacher_layers": []},
            "=0 with empty criterion.teacher_layers leaves nothing to learn",
        ),
        ({"loss": "temporal_gram", "intermediate_style": "prediction"}, "criterion.loss=temporal_gram compares"),
        ({"loss": "temporal_gram", "mask_prob": 0.5}, "criterion.loss=temporal_gram relates all frames"),
        ({"intermediate_style": "prediction", "teacher_layers": [13]}, "criterion.teacher_layers: 13 is no layer"),
    ],
)
def test_a_wrong_name_or_an_impossible_combination_ends_with_one_line(fields, message):
    with pytest.raises(InputError, match=message) as ended:
        build(**fields)
    assert "\n" not in str(ended.value)


def test_the_mask_of_an_utterance_changes_with_the_update_and_not_with_its_batch():
    task = SpeechDistillation(SimpleNamespace(mask_prob=0.5, mask_length=3, seed=1), TEACHER)
    student, _ = build(mask_prob=0.5)

    def mask(rows, update):
        sample = {"utterances": [f"{row}.flac" for row in rows], "lengths": torch.tensor(LENGTHS)[rows]}
        return task.mask(sample, student, update)

    assert torch.equal(mask([0, 1, 2, 3], 7)[1, :9], mask([1], 7)[0])
    assert len({tuple(mask([0], update)[0].tolist()) for update in range(10)}) > 5
