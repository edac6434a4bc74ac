"""The student: its size, what it computes, and how it grows."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import LINKED, TINY, stock_hubert
from omegaconf import OmegaConf

from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.criterions.layer_mapping import student_position
from fairseq_stack.errors import InputError
from fairseq_stack.models import layer_stack
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig

TEACHER = SimpleNamespace(name="teacher.pt", depth=12, width=16)


def student_config(**fields):
    return OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), LINKED, fields)


def tiny_student(seed=0, **fields):
    torch.manual_seed(seed)
    cfg = student_config(**{**TINY, "dropout": 0.0, "attention_dropout": 0.0, **fields})
    return StackedHubert.build_model(cfg, SimpleNamespace(teacher=TEACHER))


WAVEFORMS, LENGTHS = torch.randn(2, 4000, generator=torch.Generator().manual_seed(3)), torch.tensor([4000, 3000])


def test_the_papers_student_has_26_87_million_parameters_without_heads():
    task = SimpleNamespace(teacher=SimpleNamespace(name="hubert", depth=12, width=768))
    student = StackedHubert.build_model(student_config(), task)
    count = sum(parameter.numel() for name, parameter in student.named_parameters() if not name.startswith("heads."))
    assert round(count / 1e6, 2) == 26.87
    assert student.plan.depths == (3, 6, 9, 12) and student.depth == 3


def test_the_finished_student_computes_what_fairseqs_hubert_computes_with_its_weights():
    student = tiny_student().eval()
    student.grow_to(4)
    reference, _ = stock_hubert(seed=1, **TINY)
    weights = {name: value for name, value in student.state_dict().items() if not name.startswith(("heads.", "stage"))}
    missing, left_over = reference.load_state_dict(weights, strict=False)
    assert not left_over and all(name.startswith(("mask_emb", "final_proj", "label_embs")) for name in missing)
    with torch.no_grad():
        expected, _ = reference.extract_features(WAVEFORMS[:1])
        states, _ = student.hidden_states(WAVEFORMS[:1], LENGTHS[:1])
    torch.testing.assert_close(states[12], expected, atol=2e-5, rtol=1e-4)


def test_a_stage_is_the_stack_of_its_seats():
    student = tiny_student().eval()
    student.grow_to(2)
    ran = []
    for seat, layer in enumerate(student.encoder.layers):
        layer.register_forward_hook(lambda *_, seat=seat: ran.append(seat))
    output = student(WAVEFORMS, LENGTHS)
    assert ran == [0, 1, 4, 5, 8, 9]
    assert len(output["hidden_states"]) == 7 and output["stage"] == 2


def test_a_growth_copies_every_weight_of_its_source_and_touches_nothing_else():
    student = tiny_student()
    before = copy.deepcopy(student.state_dict())
    student.set_num_updates(300)  # PROP-1 of 1,000 updates: stage 3 of 4
    assert student.depth == 9
    copied = {1: 0, 2: 0, 5: 4, 6: 4, 9: 8, 10: 8}
    for name, value in student.state_dict().items():
        if name.startswith("encoder.layers."):
            seat = int(name.split(".")[2])
            source = name.replace(f"layers.{seat}.", f"layers.{copied.get(seat, seat)}.")
            assert torch.equal(value, before[source]), name
        elif name not in ("stage", "stage_seats"):
            assert torch.equal(value, before[name]), name


def test_growth_happens_once_and_never_back():
    student = tiny_student()
    student.set_num_updates(100)
    with torch.no_grad():
        student.encoder.layers[0].fc1.weight.add_(1.0)
    weights = copy.deepcopy(student.state_dict())
    for update in (100, 101, 0):
        student.set_num_updates(update)
        assert student.depth == 6
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


def test_the_depth_is_restored_with_the_weights_whatever_grew_before():
    saved = tiny_student(seed=1)
    saved.set_num_updates(100)
    resumed = tiny_student(seed=2)
    resumed.set_num_updates(300)  # fairseq announces the update before it loads the weights
    resumed.load_state_dict(saved.state_dict())
    assert resumed.depth == 6 and resumed.finish_growth() == []
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in resumed.state_dict().items())


def plateau_student(seed=0):
    """A student whose stages may end after one validation without a lower loss."""
    return tiny_student(seed, stack_schedule="plateau", stack_patience=1)


def test_a_plateau_wakes_layers_before_their_time_and_only_once():
    student = plateau_student()
    student.observe_validation(10, 5.0)
    assert student.due_stage(10) == 1
    student.observe_validation(20, 5.1)
    for update in (20, 20, 21):
        student.set_num_updates(update)
        assert student.stage_number == 2
    student.observe_validation(30, 5.0)
    student.set_num_updates(30)
    assert student.stage_number == 2


def test_a_stage_without_a_plateau_ends_as_with_prop():
    student = plateau_student()
    for update in range(0, 1000, 50):
        student.observe_validation(update, 1000.0 - update)
        student.set_num_updates(update)
        assert student.stage_number == 1 + (update >= 100) + (update >= 300) + (update >= 600)


def test_a_plateau_of_the_finished_student_changes_nothing():
    student = plateau_student()
    student.set_num_updates(600)
    for update in (700, 800, 900):
        student.observe_validation(update, 5.0)
        student.set_num_updates(update)
    assert student.stage_number == 4


@pytest.mark.parametrize("halved", [False, True])
def test_the_wait_for_a_plateau_is_restored_with_the_weights(halved):
    saved = plateau_student(seed=1)
    if halved:
        saved.half()
    saved.observe_validation(98_765, 5.4321)
    saved.plateau.start = 87_654  # more than half precision can count
    resumed = plateau_student(seed=2)
    resumed.set_num_updates(10)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.plateau == saved.plateau
    resumed.observe_validation(98_766, 5.4321)
    assert resumed.plateau.reached


def test_the_schedule_may_change_between_two_runs():
    plateau, prop = plateau_student(), tiny_student()
    plateau.load_state_dict(prop.state_dict())
    prop.load_state_dict(plateau.state_dict())
    assert plateau.plateau.seen == -1 and "plateau" not in prop.state_dict()


@pytest.mark.parametrize("method, warned", [("gradual", 1), ("midas", 1), ("interleaved", 0), ("gstack", 0)])
def test_layer_to_layer_supervision_is_warned_about_where_it_diverges(method, warned, caplog):
    tiny_student(stack_method=method)
    tiny_student(stack_method=method, teacher_layers=[12])  # no intermediate loss
    assert [f"model.stack_method={method} diverged" in message for message in caplog.messages] == [True] * warned


def test_a_checkpoint_gives_back_the_student_at_its_depth():
    student = tiny_student().eval()
    student.grow_to(3)
    state = {
        "model": student.state_dict(),
        "cfg": {"model": OmegaConf.to_container(student_config(**TINY), enum_to_str=True)},
    }
    loaded = StackedHubert.from_checkpoint(state)
    with torch.no_grad():
        ours, theirs = student(WAVEFORMS, LENGTHS), loaded(WAVEFORMS, LENGTHS)
    assert loaded.depth == 9 and set(theirs["predictions"]) == {4, 8, 12}
    assert torch.equal(ours["predictions"][12], theirs["predictions"][12])


def stacked(method, stages, stage):
    student = tiny_student(stack_method=method, stack_stages=stages, teacher_layers=[12])
    student.grow_to(stage)
    return student


@pytest.mark.parametrize(
    "saved, loaded, stage",
    [
        (("interleaved", 4, 4), ("none", 1, 1), 1),
        (("none", 1, 1), ("midas", 6, 1), 6),
        (("gradual", 4, 2), ("gradual", 2, 1), 1),
        (("gradual", 4, 2), ("stackbert", 3, 1), 2),
        (("stackbert", 3, 2), ("gradual", 4, 4), 2),
        (("interleaved", 4, 3), ("interleaved", 4, 1), 3),
    ],
)
def test_weights_are_loaded_into_the_stage_with_their_layers(saved, loaded, stage):
    saved, loaded = stacked(*saved), stacked(*loaded).half()
    loaded.load_state_dict(saved.half().state_dict())
    assert loaded.stage_number == stage == loaded.stage + 1 and loaded.seats == saved.seats


@pytest.mark.parametrize(
    "saved, loaded",
    [
        (("interleaved", 4, 2), ("gradual", 4, 1)),
        (("interleaved", 4, 2), ("interleaved", 2, 1)),
        (("interleaved", 4, 3), ("none", 1, 1)),
        (("gstack", 4, 1), ("interleaved", 4, 1)),
        (("gradual", 6, 1), ("gradual", 4, 1)),
    ],
)
def test_weights_without_a_stage_of_their_layers_are_refused(saved, loaded):
    saved, loaded = stacked(*saved), stacked(*loaded)
    with pytest.raises(InputError, match="the weights use encoder.layers 0, .* no stage of model.stack_method"):
        loaded.load_state_dict(saved.state_dict())


def test_a_checkpoint_whose_layers_are_not_those_of_its_configuration_is_refused():
    student = tiny_student()
    student.grow_to(2)
    cfg = OmegaConf.to_container(student.cfg, enum_to_str=True)
    cfg = {"model": {**cfg, "_name": "stacked_hubert"}, "task": {"normalize": False}}
    state = {"model": student.state_dict(), "cfg": cfg}
    assert student_from_checkpoint(state).depth == StackedHubert.from_checkpoint(state).depth == 6
    state["cfg"]["model"].update(stack_method="gradual")
    for read in (student_from_checkpoint, StackedHubert.from_checkpoint):
        with pytest.raises(InputError, match="model.stack_method=gradual model.stack_stages=4"):
            read(state)


def test_the_mean_of_checkpoints_is_a_checkpoint():
    """fairseq's scripts/average_checkpoints.py adds and divides every entry in place."""
    student = tiny_student(stack_schedule="plateau")
    student.grow_to(2)
    mean = {name: value.clone() for name, value in student.state_dict().items()}
    for value in mean.values():
        value += value
        value /= 2
    loaded = tiny_student(stack_schedule="plateau")
    loaded.load_state_dict(mean)
    assert loaded.seats == student.seats and loaded.plateau == student.plateau
    assert torch.equal(loaded.encoder.layers[1].fc1.weight, student.encoder.layers[1].fc1.weight)


def test_idle_layers_neither_learn_nor_matter():
    student = tiny_student()
    student(WAVEFORMS, LENGTHS)["predictions"][12].sum().backward()
    learning = {seat for seat, layer in enumerate(student.encoder.layers) if layer.fc1.weight.grad is not None}
    assert learning == {0, 4, 8}


def test_blocks_learn_from_the_same_teacher_layers_in_every_stage():
    positions = {depth: [student_position(layer, 12, depth) for layer in (4, 8, 12)] for depth in (3, 6, 9, 12)}
    assert positions == {3: [1, 2, 3], 6: [2, 4, 6], 9: [3, 6, 9], 12: [4, 8, 12]}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher_layers": [6]}, "teacher layer 6 of 12 has no student layer at the same relative depth"),
        ({"teacher_layers": [4, 13]}, "criterion.teacher_layers: 13 is no layer of task.teacher=teacher.pt"),
        ({"teacher_layers": [0]}, "criterion.teacher_layers: 0 is no layer"),
        ({"encoder_layers": 10}, "model.encoder_layers=10 is not divisible by model.stack_stages=4"),
        ({"conv_feature_layers": "__import__('os')"}, "model.conv_feature_layers=__import__"),
        ({"stack_schedule": "milestones", "stack_milestones": [5, 4, 6]}, "strictly ascending"),
        ({"stack_schedule": "plateau", "stack_patience": 0}, "model.stack_patience=0 must be at least 1"),
        ({"stack_method": "stackbert"}, "model.encoder_layers=12 is not divisible by 2"),
    ],
)
def test_an_impossible_student_ends_with_one_line(fields, message):
    with pytest.raises(InputError, match=message) as ended:
        tiny_student(**fields)
    assert "\n" not in str(ended.value)


def test_errors_inside_the_package_stay_exceptions():
    with pytest.raises(InputError):
        student_position(5, 12, 3)


def test_compiled_layers_are_one_graph_over_all_growths_with_the_same_numbers_and_keys(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def results(student):
        """Hidden states and gradients at each stage; the lengths of the batches differ."""
        found = []
        for stage in (1, 2, 3, 4):
            student.grow_to(stage)
            states, _ = student.hidden_states(WAVEFORMS[:, : 4100 - 100 * stage], LENGTHS - 100 * (stage - 1))
            gradients = torch.autograd.grad(states[-1].square().mean(), student.encoder.layers[0].fc1.weight)
            found += [*states, *gradients]
        return found

    def as_on_a_gpu(query, key, value, padding, dropout):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, ~padding[:, None, None], dropout)

    monkeypatch.setattr(layer_stack, "attention", as_on_a_gpu)
    student, compiled = tiny_student(), tiny_student()
    compiled.encoder.compile_layers(backend=count)
    expected, found = results(student), results(compiled)
    assert len(graphs) == 1
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)
    assert compiled.state_dict().keys() == student.state_dict().keys()
    assert copy.deepcopy(compiled).state_dict().keys() == student.state_dict().keys()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="compile_layers=true needs a GPU"):
        tiny_student(compile_layers=True)
