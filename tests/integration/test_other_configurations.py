"""A checkpoint under another configuration than its own: the same student trains on, and all else ends in one line."""

import shutil

import pytest
import torch
from conftest import TINY, stock_hubert
from test_resume import differences, whole_state
from training import ROOT, tiny, train

from fairseq_stack.tasks.speech_distillation import SpeechDistillation
from fairseq_stack.teachers.lazy import weights_digest


def load(path):
    return torch.load(path, weights_only=True)


def one_line(overrides):
    """The line that a training ends with."""
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", overrides)
    message = ended.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def made(speech, teacher_file, tmp_path_factory):
    """The checkpoints of a run that grows after each update: checkpoint_1_N.pt is of stage N, the last is finished."""
    folder = tmp_path_factory.mktemp("made")
    every_update = {"checkpoint.save_interval_updates": 1, "checkpoint.keep_interval_updates": -1}
    equal = {"model.stack_schedule": "equal", "optimization.max_update": 4}
    train("librispeech_base", tiny(speech, teacher_file, folder, **every_update, **equal))
    return folder / "checkpoints"


@pytest.fixture
def fields(speech, teacher_file, tmp_path):
    """Overrides of a run in an empty folder."""
    return lambda **more: tiny(speech, teacher_file, tmp_path, **{"optimization.max_update": 6, **more})


@pytest.fixture
def last(tmp_path):
    """Put a file in the place where a run resumes."""

    def put(path):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        return shutil.copy(path, tmp_path / "checkpoints/checkpoint_last.pt")

    return put


def put_by(field, path, last):
    """The fields that let a training load a file, and the path that it will name."""
    if field == "checkpoint.save_dir":
        return {}, last(path)
    return {field: path}, path


FIELDS = ("checkpoint.save_dir", "checkpoint.restore_file", "checkpoint.finetune_from_model")


@pytest.mark.parametrize(
    "stage, method, stages, field, version",
    [
        (1, "gradual", 4, "checkpoint.save_dir", "this"),
        (2, "gradual", 4, "checkpoint.restore_file", "older"),
        (3, "midas", 4, "checkpoint.finetune_from_model", "this"),
        (2, "interleaved", 2, "checkpoint.save_dir", "older"),
        (2, "interleaved", 1, "checkpoint.finetune_from_model", "older"),
        (3, "none", 1, "checkpoint.restore_file", "this"),
        (1, "stackbert", 3, "checkpoint.save_dir", "this"),
    ],
)
def test_layers_of_another_plan_are_refused(stage, method, stages, field, version, made, fields, last, tmp_path):
    state = load(made / f"checkpoint_1_{stage}.pt")
    if version == "older":
        del state["model"]["stage_seats"]
    torch.save(state, tmp_path / "given.pt")
    chosen, path = put_by(field, tmp_path / "given.pt", last)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*.pt")}
    message = one_line(fields(**chosen, **{"model.stack_method": method, "model.stack_stages": stages}))
    assert str(path) in message and f"another {field}" in message
    assert "model.stack_method=interleaved model.stack_stages=4" in message
    assert f"model.stack_method={method} model.stack_stages={stages}" in message
    seats = {1: "0, 4, 8", 2: "0, 1, 4, 5, 8, 9", 3: "0, 1, 2, 4, 5, 6, 8, 9, 10"}[stage]
    assert f"encoder.layers {seats} of 12" in message
    assert {each: each.read_bytes() for each in tmp_path.rglob("*.pt")} == before


def test_a_finished_student_trains_on_in_the_same_way_under_every_method(made, speech, teacher_file, tmp_path):
    ended = []
    methods = [("interleaved", 4), ("none", 1), ("gradual", 2)]
    for method, stages in methods:
        folder = tmp_path / method
        shutil.copytree(made, folder / "checkpoints")
        more = {"model.stack_method": method, "model.stack_stages": stages, "optimization.max_update": 6}
        more.update({"ema.store_ema": True, "ema.ema_fp32": True})
        student = train("librispeech_base", tiny(speech, teacher_file, folder, **more)).get_model()
        assert student.depth == 12 and student.stage_number == len(student.plan.stages)
        ended.append(whole_state(folder))
        assert ended[-1]["optimizer_history"]["num_updates"] == 6
        assert ended[-1]["model"].pop("stage") == student.stage_number - 1 and ended[-1]["model"]["stage_seats"].all()
        assert ended[-1]["extra_state"]["ema"].pop("stage") == student.stage_number - 1
        del ended[-1]["metrics"]  # where it is logged
    for other in ended:
        assert other["last_optimizer_state"]["state"] and not differences(ended[0], other)

    more.update({"model.stack_method": "none", "model.stack_stages": 1, "optimization.max_update": 7})
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "gradual", **more))
    average = load(tmp_path / "gradual/checkpoints/checkpoint_last.pt")["extra_state"]["ema"]
    assert average["stage"] == 0 and average["stage_seats"].all()


def test_layers_that_two_plans_share_train_on_in_the_stage_of_the_new_one(speech, teacher_file, tmp_path, caplog):
    caplog.set_level("INFO")

    def run(method, stages, updates, **more):
        more.update({"model.stack_method": method, "model.stack_stages": stages, "optimization.max_update": updates})
        return train("librispeech_base", tiny(speech, teacher_file, tmp_path, **more)).get_model()

    milestones = {"model.stack_schedule": "milestones", "criterion.teacher_layers": "[12]"}
    more = {"+model.stack_milestones": "[2,3,4]", "checkpoint.save_interval_updates": 3}
    student = run("gradual", 4, 5, **milestones, **more)
    path = tmp_path / "checkpoints/checkpoint_1_3.pt"
    assert student.depth == 12 and load(path)["model"]["stage"] == 1
    more = {"+model.stack_milestones": "[1,5]", "checkpoint.restore_file": path}
    student = run("stackbert", 3, 6, **milestones, **more)
    assert student.depth == 12 and student.stage_number == 3
    (line,) = [message for message in caplog.messages if "growth | update" in message][3:]
    assert line.startswith("growth | update 5 | stage 3 | depth 6 -> 12")


def test_a_new_run_from_a_finished_student_begins_at_update_0(made, fields, tmp_path):
    path = made / "checkpoint_last.pt"
    more = {"model.stack_method": "none", "model.stack_stages": 1, "ema.store_ema": True, "ema.ema_decay": 1.0}
    trainer = train("librispeech_base", fields(**more, **{"checkpoint.finetune_from_model": path}))
    state = load(tmp_path / "checkpoints/checkpoint_last.pt")
    assert trainer.get_num_updates() == 6 and trainer.get_model().depth == 12
    assert [each["num_updates"] for each in state["optimizer_history"]] == [6]
    given = load(path)["model"]
    for name, value in state["extra_state"]["ema"].items():  # which has not moved, with this decay
        if name.startswith("encoder.layers"):
            assert torch.equal(value, given[name]) and not torch.equal(value, state["model"][name])


@pytest.fixture
def growths(monkeypatch):
    seen = []
    grow = SpeechDistillation.grow

    def watched(task, sample, model, criterion, optimizer, update_num, ema_model):
        grow(task, sample, model, criterion, optimizer, update_num, ema_model)
        seen.append((update_num, model.depth))

    monkeypatch.setattr(SpeechDistillation, "grow", watched)
    return seen


def test_a_new_run_does_not_take_over_a_plateau(growths, speech, teacher_file, tmp_path):
    plateau = {"model.stack_schedule": "plateau", "model.stack_alpha": 0, "+model.stack_patience": 1,
               "optimization.lr": "[0.2]", "model.stack_stages": 2, "optimization.max_update": 12,
               "checkpoint.save_interval_updates": 1, "checkpoint.keep_interval_updates": -1}  # fmt: skip
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "one", **plateau))
    ((update, _),) = growths
    assert 1 < update < 6  # before the schedule's time and the end of the epoch
    path = tmp_path / f"one/checkpoints/checkpoint_1_{update}.pt"
    assert load(path)["model"]["plateau"][2] == 1  # it waits for no more validations
    growths.clear()
    new = {**plateau, "checkpoint.finetune_from_model": path, "optimization.max_update": 4, "optimization.lr": "[0.0]"}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "two", **new))
    assert [update for update, _ in growths] == [2]


PLATEAU = {"model.stack_schedule": "plateau", "model.stack_alpha": 0, "+model.stack_patience": 2,
           "model.stack_stages": 2, "checkpoint.save_interval_updates": 2, "optimization.max_epoch": 1,
           "optimization.lr": "[0.005]"}  # fmt: skip


@pytest.mark.parametrize(
    "field, value, there",
    [("+criterion.output_weight", 3, "1.0"), ("checkpoint.best_checkpoint_metric", "layer_4", "loss")],
)
def test_a_validation_that_measures_something_else_is_not_compared_with_the_best_before(
    field, value, there, growths, speech, teacher_file, tmp_path, caplog
):
    caplog.set_level("INFO")
    fields = {**PLATEAU, "optimization.max_update": 30}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    path = tmp_path / "checkpoints/checkpoint_best.pt"
    best = load(path)["extra_state"]["best"]
    for more in ({}, {field: value}):
        given = {**fields, **more, "optimization.max_epoch": 2, "optimization.lr": "[1.0e-9]"}
        given.update({"checkpoint.restore_file": path, "checkpoint.save_dir": tmp_path / f"resumed{len(more)}"})
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **given))
    (line,) = [message for message in caplog.messages if "validation loss starts anew" in message]
    assert f"{field.split('.')[1]}={there} there and {value}" in line
    assert load(tmp_path / "resumed1/checkpoint_best.pt")["extra_state"]["best"] != best


def test_a_run_that_begins_to_keep_a_moving_average_begins_with_its_weights(made, fields, last, tmp_path):
    given = load(last(made / "checkpoint_1_3.pt"))["model"]
    train("librispeech_base", fields(**{"ema.store_ema": True, "ema.ema_decay": 1.0}))
    average = load(tmp_path / "checkpoints/checkpoint_last.pt")["extra_state"]["ema"]
    assert torch.equal(average["encoder.layers.0.fc1.weight"], given["encoder.layers.0.fc1.weight"])


@pytest.fixture(scope="module")
def another_teacher(tmp_path_factory):
    model, cfg = stock_hubert(seed=7, **TINY)
    path = tmp_path_factory.mktemp("another") / "teacher.pt"
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict(), "task_state": {}}, path)
    return path


def test_a_run_keeps_its_teacher_wherever_it_lies(made, fields, last, teacher_file, another_teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    path = last(made / "checkpoint_last.pt")
    message = one_line(fields(**{"task.teacher": another_teacher}))
    assert str(path) in message and str(another_teacher) in message and str(teacher_file) in message
    moved = shutil.copy(teacher_file, tmp_path / "moved.pt")
    precision = {
        "+task.teacher_precision": "bf16",
        "optimization.lr": "[0.001]",
        "criterion.teacher_layers": "[12,4,8]",
    }
    trainer = train("librispeech_base", fields(**{"task.teacher": moved}, **precision))
    assert trainer.get_num_updates() == 6
    (line,) = [message for message in caplog.messages if "differs from that of" in message]
    assert "task.teacher_precision=fp32 there and bf16 here" in line and "teacher_layers" not in line
    assert "optimization.lr=[0.0005] there and [0.001] here" in line and "optimization.max_update=4 there" in line
    new = {"checkpoint.finetune_from_model": made / "checkpoint_last.pt", "checkpoint.save_dir": tmp_path / "new"}
    assert train("librispeech_base", fields(**{"task.teacher": another_teacher}, **new)).get_num_updates() == 6


@pytest.mark.parametrize(
    "name, value, there, field",
    [
        ("criterion.teacher_layers", "[8,12]", "[4, 8, 12]", "checkpoint.finetune_from_model"),
        ("+criterion.output_weight", 0, "1.0", "checkpoint.restore_file"),
        ("+model.head_inner_dim", 8, "0", "checkpoint.save_dir"),
        ("model.encoder_attention_heads", 2, "4", "checkpoint.finetune_from_model"),
        ("+model.activation_fn", "relu", "gelu", "checkpoint.restore_file"),
        ("+task.mask_prob", 0.5, "0.0", "checkpoint.finetune_from_model"),
    ],
)
def test_another_network_or_other_heads_are_refused(name, value, there, field, made, fields, last):
    chosen, path = put_by(field, made / "checkpoint_1_2.pt", last)
    more = {"criterion.teacher_layers": "[4,8]"} if "output_weight" in name else {}
    message = one_line(fields(**chosen, **{name: value}, **more))
    assert str(path) in message and f"another {field}" in message
    assert f"{name.lstrip('+')}={there} there" in message


OTHER_TRAINING = {
    "criterion.loss": "l1",
    "criterion.intermediate_style": "prediction",
    "criterion.target_normalization": "layer_norm",
    "task.normalize": True,
    "model.feature_grad_mult": 0,
}


def given(name):
    """As an override, for which the recipe has to name the field."""
    return name if name == "task.normalize" else f"+{name}"


@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_a_run_does_not_resume_as_another_training(name, made, fields, last):
    path = last(made / "checkpoint_1_2.pt")
    message = one_line(fields(**{given(name): OTHER_TRAINING[name]}))
    assert str(path) in message and f"{name}=" in message and f"checkpoint.finetune_from_model={path}" in message


def test_a_new_run_may_be_another_training_and_says_so(made, fields, caplog):
    caplog.set_level("INFO")
    other = {given(name): value for name, value in OTHER_TRAINING.items()}
    other["checkpoint.finetune_from_model"] = made / "checkpoint_1_2.pt"
    trainer = train("librispeech_base", fields(**other))
    assert trainer.get_num_updates() == 6 and trainer.get_model().depth == 12
    (line,) = [message for message in caplog.messages if "differs from that of" in message]
    assert all(f"{name}=" in line for name in OTHER_TRAINING)


def test_a_new_run_does_not_start_in_the_folder_of_another(made, fields, last, caplog, tmp_path):
    path, given = last(made / "checkpoint_1_2.pt"), made / "checkpoint_1_3.pt"
    message = one_line(fields(**{"checkpoint.finetune_from_model": given}))
    assert f"{path} is of a run that did not start from checkpoint.finetune_from_model={given}" in message
    assert train("librispeech_base", fields(**{"checkpoint.restore_file": given})).get_num_updates() == 6
    (line,) = [message for message in caplog.messages if "every start loads" in message]
    assert f"checkpoint.restore_file={given}" in line and f"leaves {path} aside" in line
    new = {
        "checkpoint.finetune_from_model": given,
        "checkpoint.save_dir": tmp_path / "new",
        "optimization.max_epoch": 1,
    }
    for updates in (6, 8):  # the same command again resumes
        new["optimization.max_update"] = updates
        assert train("librispeech_base", fields(**new)).get_num_updates() == 6


def test_a_shared_cnn_has_to_be_the_students(made, fields):
    shared = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0}
    message = one_line(fields(**shared, **{"checkpoint.finetune_from_model": made / "checkpoint_last.pt"}))
    assert "another CNN than task.teacher" in message and "model.share_teacher_cnn=true" in message


@pytest.mark.parametrize(
    "more, words",
    [
        ({"checkpoint.restore_file": "gone.pt"}, "checkpoint.restore_file=gone.pt is no file"),
        ({"checkpoint.finetune_from_model": ROOT}, "is no file; give the path of a checkpoint"),
        (
            {"checkpoint.finetune_from_model": "x.pt", "checkpoint.reset_optimizer": True},
            "reset_optimizer=true; set one",
        ),
        ({"checkpoint.finetune_from_model": "x.pt", "checkpoint.restore_file": "y.pt"}, "restore_file=y.pt; set one"),
    ],
)
def test_a_file_that_is_not_there_or_two_ways_to_start_are_refused(more, words, fields):
    assert words in one_line(fields(**more))


def test_a_teacher_is_no_student_to_go_on_from(fields, teacher_file):
    message = one_line(fields(**{"checkpoint.finetune_from_model": teacher_file}))
    assert f"{teacher_file} holds a model named hubert, no stacked_hubert" in message


@pytest.mark.parametrize("average", [True, False])
def test_a_moving_average_of_another_plan_or_none_is_no_seed(average, speech, teacher_file, tmp_path):
    keeps = {"ema.store_ema": average, "model.stack_schedule": "equal", "optimization.max_update": 4}
    keeps["checkpoint.save_interval_updates"] = 2
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "one", **keeps))
    path = tmp_path / "one/checkpoints/checkpoint_1_2.pt"
    seeded = {"ema.store_ema": True, "ema.ema_seed_model": path, "model.stack_method": "gradual"}
    message = one_line(tiny(speech, teacher_file, tmp_path / "two", **seeded))
    assert f"ema.ema_seed_model={path}" in message and ("encoder.layers 0, 1, 4, 5, 8, 9" in message) is average


def test_a_teacher_is_known_by_its_weights(tmp_path):
    def folder(name, weights, config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(weights)
        (tmp_path / name / "config.json").write_text(config)
        return weights_digest(tmp_path / name)

    assert folder("one", "weights", "{}") == folder("two", "weights", '{"transformers_version": "5"}')
    assert folder("three", "others", "{}") != weights_digest(tmp_path / "one")


def test_a_run_from_before_epsilon_could_be_chosen_keeps_its_own(fields, tmp_path):
    equal = {"model.stack_schedule": "equal", "optimization.max_update": 4}
    normalised = {"task.normalize": True, **equal, "+task.normalize_epsilon": "1.0e-5"}
    train("librispeech_base", fields(**normalised))
    path = tmp_path / "checkpoints/checkpoint_last.pt"
    state = load(path)
    del state["cfg"]["task"]["normalize_epsilon"]  # as the version before wrote it
    torch.save(state, path)
    more = {**normalised, "optimization.max_update": 6}
    assert "task.normalize_epsilon=1e-05 there and 1e-07 here" in one_line(
        fields(**{**more, "+task.normalize_epsilon": "1.0e-7"})
    )
    assert train("librispeech_base", fields(**more)).get_num_updates() == 6
