"""A run that ends before full depth says so, and what it takes for a plateau is there or missed at the start."""

import json
from dataclasses import replace

import pytest
import torch
from fairseq_cli import train as fairseq_train
from training import configuration, tiny, train

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.export.card import model_card
from fairseq_stack.export.student import export
from fairseq_stack.tasks.speech_distillation import SpeechDistillation
from fairseq_stack.training.full_depth import validations


@pytest.fixture
def fields(speech, teacher_file, tmp_path):
    """Overrides of a run of 20 updates, in epochs of 6, whose stages begin at updates 0, 2, 6 and 12."""
    return lambda **more: tiny(speech, teacher_file, tmp_path, **more)


def ends(caplog):
    return [message for message in caplog.messages if message.startswith("the run ends")]


@pytest.mark.parametrize(
    "limit, line",
    [
        (
            {"optimization.max_epoch": 1},
            "the run ends at update 6 in stage 2 of 4, before full depth: the student has 6 of 12 layers. It ended by"
            " optimization.max_epoch=1; raise it and start the same command again to reach the next stage",
        ),
        (
            {"checkpoint.patience": 1, "checkpoint.save_interval_updates": 1, "optimization.lr": "[0.0]"},
            "the run ends at update 2 in stage 1 of 4, before full depth: the student has 3 of 12 layers. It ended by"
            " checkpoint.patience=1; raise it and start the same command again to reach the next stage",
        ),
        (
            {"optimization.stop_min_lr": 0.0005, "lr_scheduler.warmup_updates": 8},
            "the run ends at update 0 in stage 1 of 4, before full depth: the student has 3 of 12 layers. It ended by"
            " optimization.stop_min_lr=0.0005; lower it and start the same command again to reach the next stage, which"
            " begins at update 2",
        ),
        (
            {"optimization.stop_time_hours": 1e-6},
            "the run ends at update 1 in stage 1 of 4, before full depth: the student has 3 of 12 layers. It ended by"
            " optimization.stop_time_hours=1e-06; raise it and start the same command again to reach the next stage,"
            " which begins at update 2",
        ),
    ],
)
def test_a_run_that_ends_before_full_depth_says_by_what(limit, line, fields, caplog):
    train("librispeech_base", fields(**limit))
    assert ends(caplog) == [line]
    if "optimization.max_epoch" in limit:  # known at the start already
        assert [message for message in caplog.messages if message.startswith("optimization.max_epoch=1 ends the run")]


def test_a_run_that_is_cut_short_and_started_again_says_it_each_time_until_it_is_finished(fields, caplog, tmp_path):
    for _ in range(2):
        train("librispeech_base", fields(**{"optimization.max_epoch": 1}))
    train("librispeech_base", fields(**{"optimization.max_update": 6}))
    assert len(ends(caplog)) == 3 and "optimization.max_update=6; raise it" in ends(caplog)[2]
    assert train("librispeech_base", fields(**{"optimization.max_update": 10})).get_model().depth == 12
    assert len(ends(caplog)) == 3


def test_the_export_of_a_student_before_full_depth_says_so(fields, caplog, tmp_path):
    train("librispeech_base", fields(**{"optimization.max_epoch": 1}))
    checkpoint = tmp_path / "checkpoints/checkpoint_last.pt"
    caplog.clear()
    export(checkpoint, "huggingface", tmp_path / "student")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fairseq_stack.export.student"]
    assert str(checkpoint) in line and "6 of 12 layers" in line and "\n" not in line
    assert "its growth has not ended, the student has 6 of 12 layers" in (tmp_path / "student/README.md").read_text()

    state = load_checkpoint(checkpoint)
    finished = replace(student_from_checkpoint(state), depth=12)
    assert "growth has not ended" not in model_card(
        finished, state, json.loads((tmp_path / "student/verification.json").read_text())
    )


@pytest.mark.parametrize("patience", [-1, 1])
def test_the_best_checkpoint_is_of_the_deepest_stage(patience, fields, tmp_path, monkeypatch):
    losses = iter([1.0, 5.0, 4.0, 4.5])  # the best one before the growth, which makes it worse

    def validated(*args, **kwargs):
        return [next(losses)]

    monkeypatch.setattr(fairseq_train, "validate", validated)
    more = {
        "model.stack_stages": 2,
        "model.stack_schedule": "milestones",
        "+model.stack_milestones": "[1]",
        "optimization.max_update": 4,
        "checkpoint.save_interval_updates": 1,
        "checkpoint.patience": patience,
    }
    trainer = train("librispeech_base", fields(**more))
    best = torch.load(tmp_path / "checkpoints/checkpoint_best.pt", weights_only=True)
    assert trainer.get_num_updates() == 4
    assert best["optimizer_history"][-1]["num_updates"] == 3 and best["model"]["stage"] == 1
    assert best["extra_state"]["best"] == best["extra_state"]["val_loss"] == 4.0


PLATEAU = {"model.stack_schedule": "plateau", "checkpoint.save_interval_updates": 0}
ONE_UPDATE = {"optimization.stop_time_hours": 1e-9, "checkpoint.no_save": True}


@pytest.mark.parametrize(
    "more, words",
    [
        ({"dataset.disable_validation": True}, "dataset.disable_validation=true there is none"),
        ({"dataset.validate_interval": 9, "dataset.validate_interval_updates": 0}, "dataset.validate_interval=9 there"),
        ({"dataset.validate_after_updates": 12, "dataset.validate_interval_updates": 1}, "validate_after_updates=12"),
        ({"dataset.validate_interval_updates": 12, "dataset.validate_interval": 9}, "validate_interval_updates=1, or"),
    ],
)
def test_a_plateau_without_validations_is_refused_at_the_start(more, words, fields, tmp_path):
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", fields(**PLATEAU, **more))
    message = ended.value.code
    assert message.startswith("error: model.stack_schedule=plateau") and "\n" not in message
    assert words in message and "before the last stage begins, at update 12" in message
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_plateau_with_few_validations_is_warned_of(fields, caplog):
    more = {"+model.stack_patience": 2, "dataset.validate_interval_updates": 1}
    train("librispeech_base", fields(**PLATEAU, **ONE_UPDATE, **more))
    train("librispeech_base", fields(**PLATEAU, **ONE_UPDATE, **more, **{"dataset.validate_after_updates": 4}))
    lines = [message for message in caplog.messages if message.startswith("model.stack_schedule=plateau")]
    assert ["stage 1 of 4 has fewer than the 3 validations" in lines[0], "stage 1, 2 of 4 has" in lines[1]] == [
        True
    ] * 2
    caplog.clear()
    more = {"dataset.validate_interval_updates": 1, "+model.stack_min_updates": 4}
    train("librispeech_base", fields(**PLATEAU, **ONE_UPDATE, **more))
    (line,) = [message for message in caplog.messages if "stack_min_updates=4" in message]
    assert "stage 1, 2 of 4 has no more updates" in line


@pytest.mark.parametrize("patience, warned", [(2, True), (3, False), (-1, False)])
def test_an_early_stop_before_every_plateau_is_warned_of(patience, warned, fields, caplog):
    more = {"+model.stack_patience": 2, "dataset.validate_interval_updates": 1, "checkpoint.patience": patience}
    train("librispeech_base", fields(**PLATEAU, **ONE_UPDATE, **more))
    lines = [message for message in caplog.messages if message.startswith("checkpoint.patience=2 ends the run where")]
    assert len(lines) == warned and all("set checkpoint.patience=3 or more" in line for line in lines)


def test_a_finished_student_needs_no_validations_for_a_plateau(fields, tmp_path):
    equal = {"model.stack_schedule": "equal", "optimization.max_update": 4}
    train("librispeech_base", fields(**equal))
    more = {**PLATEAU, "dataset.disable_validation": True, "optimization.max_update": 6}
    assert train("librispeech_base", fields(**more)).get_num_updates() == 6


@pytest.mark.parametrize(
    "more",
    [
        {
            "dataset.validate_interval": 2,
            "dataset.validate_interval_updates": 5,
            "dataset.validate_after_updates": 5,
            "checkpoint.save_interval_updates": 4,
            "optimization.update_freq": "[1,2]",
        },
        {
            "dataset.validate_interval": 9,
            "dataset.validate_interval_updates": 0,
            "checkpoint.save_interval_updates": 3,
            "optimization.max_epoch": 2,
        },
    ],
)
def test_the_validations_foreseen_are_those_that_fairseq_makes(more, fields, monkeypatch):
    seen = []
    monkeypatch.setattr(
        SpeechDistillation, "post_validate", lambda task, model, stats, agg: seen.append(stats["num_updates"])
    )
    fields = fields(**{"optimization.max_update": 13, "checkpoint.no_save": True, **more})
    updates = train("librispeech_base", fields).get_num_updates()
    foreseen = list(validations(configuration("librispeech_base", fields), 6, updates))
    assert foreseen and foreseen == [update for update in seen if update < updates]
