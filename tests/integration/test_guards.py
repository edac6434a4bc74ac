"""What fairseq_guards.py promises, against the real fairseq: these tests fail if fairseq changes under it."""

import builtins
import io
import pickle
import re

import pytest
import torch
from fairseq import options
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from training import ROOT, run_training, tiny, train

from fairseq_stack.errors import InputError, Preempted
from fairseq_stack.tasks.speech_distillation import SpeechDistillation


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def load(path):
    return torch.load(path, weights_only=True)


def one_line(overrides, code=None):
    """The line that a training ends with."""
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", overrides)
    message = ended.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_no_checkpoint_is_ever_written_in_place(speech, teacher_file, tmp_path, monkeypatch):
    written, opened = [], open

    def watched(file, mode="r", *args, **kwargs):
        if mode[0] in "wax+":
            written.append(str(file))
        return opened(file, mode, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", watched)
    every_update = {"checkpoint.save_interval_updates": 1, "checkpoint.keep_interval_updates": -1}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **every_update))
    checkpoints = {name for name in written if name.startswith(f"{tmp_path}/checkpoints/checkpoint")}
    assert f"{tmp_path}/checkpoints/checkpoint_last.pt.tmp" in checkpoints  # the copy; fairseq opens it as it is
    assert len(checkpoints) >= 15 and all(name.endswith(".tmp") for name in checkpoints)


@pytest.mark.parametrize("error", [InputError, Preempted])
def test_a_training_that_answers_the_error_of_another_saves_its_checkpoints(speech, teacher_file, tmp_path, error):
    try:
        raise error
    except error:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **{"optimization.max_update": 7}))
    assert load(tmp_path / "checkpoints/checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 7


@pytest.fixture(scope="module")
def finished(speech, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train("librispeech_base", tiny(speech, teacher_file, folder, **{"checkpoint.save_interval_updates": 7}))
    return folder / "checkpoints"


@pytest.fixture
def run(finished, tmp_path):
    """A run that has ended, to do something to."""
    (tmp_path / "checkpoints").mkdir()
    for path in finished.iterdir():
        (tmp_path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_finished_run_that_is_started_again_stays_as_it_is(run, speech, teacher_file):
    before = (run / "checkpoints/checkpoint_last.pt").read_bytes()
    trainer = train("librispeech_base", tiny(speech, teacher_file, run))
    assert trainer.get_num_updates() == 20
    assert (run / "checkpoints/checkpoint_last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "place, field",
    [
        ("checkpoints/checkpoint_last.pt", None),
        ("checkpoints/elsewhere.pt", "checkpoint.restore_file"),
        ("elsewhere.pt", "checkpoint.finetune_from_model"),
        ("elsewhere.pt", "ema.ema_seed_model"),
    ],
)
def test_a_checkpoint_that_needs_code_runs_none_and_gives_one_line(run, speech, teacher_file, place, field):
    path = run / place
    state = load(run / "checkpoints/checkpoint_last.pt")
    torch.save({**state, "args": Hostile(run / "ran")}, path)
    more = {field: path} if field else {}
    if place == "elsewhere.pt":  # for new runs alone
        more.update({"checkpoint.save_dir": run / "new", "ema.store_ema": True})
    message = one_line(tiny(speech, teacher_file, run, **more))
    assert path.name in message and "could run code" in message
    assert path.exists() and not (run / "ran").exists()
    # The object is as hostile as it claims to be.
    pickle.loads(pickle.dumps(Hostile(run / "ran"))).close()
    assert (run / "ran").exists()


def test_a_run_whose_last_checkpoint_is_cut_off_says_what_it_goes_on_from(run, speech, teacher_file, caplog):
    last = run / "checkpoints/checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    caplog.set_level("INFO")
    trainer = train("librispeech_base", tiny(speech, teacher_file, run))
    lines = [line for line in caplog.messages if "recovery | " in line]
    assert re.search(r"skipped \S+checkpoint_last.pt: \S.*checkpoint_last.pt.broken$", lines[0])
    assert re.search(r"checkpoint_\S+.pt at update \d+ is the newest whole checkpoint", lines[1])
    assert trainer.get_num_updates() == 20 and load(last)["optimizer_history"][-1]["num_updates"] == 20


def test_a_checkpoint_of_another_model_gives_one_line(run, speech, teacher_file):
    message = one_line(tiny(speech, teacher_file, run, **{"model.encoder_ffn_embed_dim": 64}))
    assert f"{run}/checkpoints/checkpoint_last.pt" in message and "another checkpoint.save_dir" in message
    assert "model.encoder_ffn_embed_dim=32 there and 64 here" in message


NAG = ["optimizer._name=nag", "~optimizer.adam_betas", "~optimizer.adam_eps"]
COSINE = ["lr_scheduler._name=cosine", "~lr_scheduler.total_num_update"]


@pytest.mark.parametrize(
    "change, before, reset",
    [
        (NAG, "optimizer._name=adamw", "checkpoint.reset_optimizer=true"),
        (["common.bf16=true"], "common.bf16=false", "checkpoint.reset_optimizer=true"),
        (["common.amp=true"], "common.amp=false", "checkpoint.reset_optimizer=true"),
        (COSINE, "lr_scheduler._name=polynomial_decay", "checkpoint.reset_lr_scheduler=true"),
    ],
    ids=["optimizer", "bf16", "amp", "schedule"],
)
def test_another_optimizer_or_schedule_is_named_with_its_reset_which_works(
    run, speech, teacher_file, change, before, reset
):
    message = one_line([*tiny(speech, teacher_file, run), *change])
    assert message.startswith(f"error: {change[0]} does not fit the state in {run}/checkpoints/checkpoint_last.pt")
    assert f"was saved with {before}; set {before}, or" in message and reset in message
    trainer = train("librispeech_base", [*tiny(speech, teacher_file, run), *change, reset])
    assert trainer.get_num_updates() == 20


def test_a_run_with_adam_resumes_with_adamw_and_ends_as_with_adam(speech, teacher_file, tmp_path):
    ends = []
    for name in ("adam", "adamw"):
        fields = tiny(speech, teacher_file, tmp_path / name, **{"optimization.max_update": 8})
        stopped = [*fields, "optimizer._name=adam", "optimization.max_update=6", "lr_scheduler.total_num_update=8"]
        train("librispeech_base", stopped)
        ends.append(train("librispeech_base", [*fields, f"optimizer._name={name}"]).get_model().state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_run_with_a_reset_optimizer_resumes_beside_the_checkpoints_before_it(speech, teacher_file, tmp_path, caplog):
    def fields(**more):
        fields = {
            "optimization.max_update": 9,
            "checkpoint.save_interval_updates": 3,
            "checkpoint.keep_interval_updates": -1,
        }
        return tiny(speech, teacher_file, tmp_path, **{**fields, **more})

    train("librispeech_base", fields())
    message = one_line([*fields(), *NAG])
    assert "checkpoint.reset_optimizer=true" in message
    stopped = fields(**{"checkpoint.reset_optimizer": True, "optimization.stop_time_hours": 1e-9})
    assert train("librispeech_base", [*stopped, *NAG]).get_num_updates() == 1
    caplog.set_level("INFO")
    assert train("librispeech_base", [*fields(), *NAG]).get_num_updates() == 9
    assert any("(epoch 2 @ 1 updates)" in each for each in caplog.messages)


def test_a_checkpoint_without_the_state_of_its_optimizer_is_not_resumed_from(speech, teacher_file, tmp_path, caplog):
    fields = {"optimization.max_update": 7, "checkpoint.no_save_optimizer_state": True}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    assert "checkpoint.no_save_optimizer_state=true: once this run is stopped, it cannot resume" in caplog.messages
    message = one_line(tiny(speech, teacher_file, tmp_path, **fields))
    path = tmp_path / "checkpoints/checkpoint_last.pt"
    assert message.startswith(f"error: {path} was saved without the state of its optimizer")
    advice = f"checkpoint.finetune_from_model={path}"
    assert f"{advice} with a new checkpoint.save_dir" in message
    advised = [*tiny(speech, teacher_file, tmp_path / "new", **{"optimization.max_update": 7}), advice]
    assert train("librispeech_base", advised).get_num_updates() == 7


def test_patience_is_counted_over_a_resume(speech, teacher_file, tmp_path):
    worse = {"optimization.lr": "[0.0]", "checkpoint.patience": 3, "optimization.max_update": 40}
    worse.update({"model.stack_method": "none", "model.stack_stages": 1})  # no growth starts the count anew

    def updates(folder, **more):
        return train(
            "librispeech_base", tiny(speech, teacher_file, tmp_path / folder, **{**worse, **more})
        ).get_num_updates()

    at_once = updates("whole")
    assert at_once == 4 * 6  # six batches an epoch: the best loss, and three that are no better
    assert updates("stopped", **{"optimization.max_epoch": 3}) == 3 * 6
    assert updates("stopped") == at_once


def test_the_older_command_line_resumes_with_an_optimizer_whose_fields_fairseq_does_not_declare(
    speech, teacher_file, tmp_path
):
    def start(optimizer, updates):
        arguments = ["--user-dir", f"{ROOT}/fairseq_stack", "--task", "speech_distillation", "--arch", "stacked_hubert",
                     "--criterion", "layer_distillation", "--teacher", teacher_file, "--teacher-layers", "4,8,12",
                     "--conv-feature-layers", "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2", "--conv-pos", 8,
                     "--conv-pos-groups", 4, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32,
                     "--encoder-attention-heads", 4, "--stack-stages", 1, "--stack-method", "none", "--batch-size", 4, "--required-batch-size-multiple", 1,
                     "--lr", 0.0005, "--save-dir", tmp_path, "--optimizer", optimizer, "--max-update", updates]  # fmt: skip
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, input_args=[str(speech), *map(str, arguments)])
        run_training(convert_namespace_to_omegaconf(args))

    start("sgd", 2)
    start("sgd", 4)
    assert [each["num_updates"] for each in load(tmp_path / "checkpoint_last.pt")["optimizer_history"]] == [2, 4]
    with pytest.raises(SystemExit, match="optimizer._name=adagrad does not fit .*; set optimizer._name=sgd, or for"):
        start("adagrad", 6)


def test_a_run_goes_on_under_half_precision_only_with_the_optimizer_inside(run, speech, teacher_file, tmp_path):
    # FP16Optimizer is the class that fairseq compares, whatever is inside.
    half = {"common.bf16": True, "optimization.max_update": 7, "checkpoint.save_dir": tmp_path / "half"}
    train("librispeech_base", tiny(speech, teacher_file, run, **half))
    message = one_line([*tiny(speech, teacher_file, run, **half), *NAG])
    assert message.startswith("error: optimizer._name=nag does not fit the state in")


@pytest.mark.parametrize(
    "field, value",
    [("task.max_sample_size", "long"), ("model.encoder_layers", "[1,2]"), ("criterion.teacher_layers", "all")],
)
def test_a_value_of_the_wrong_type_gives_one_line_with_the_field(speech, teacher_file, tmp_path, field, value):
    assert field.split(".")[1] in one_line([*tiny(speech, teacher_file, tmp_path), f"{field}={value}"])


def test_a_field_that_does_not_exist_gives_one_line(speech, teacher_file, tmp_path):
    assert "max_samples" in one_line([*tiny(speech, teacher_file, tmp_path), "+task.max_samples=3"])


# Numbers out of range


PLACE = r"error: at update (\d+), stage (\d), the (.*) is not finite on the utterances (audio/train\d+\.flac(, )?){4}"


def the_last_good_checkpoint(run):
    """There is no crash.pt, and what is there is finite."""
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert "crash.pt" not in names
    return all(value.isfinite().all() for value in load(run / "checkpoints/checkpoint_last.pt")["model"].values())


def test_a_loss_that_is_not_finite_names_update_stage_and_utterances(speech, teacher_file, tmp_path, monkeypatch):
    train_step = SpeechDistillation.train_step

    def damaged_by_something(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == 5:
            with torch.no_grad():
                model.encoder.layers[0].fc1.bias[0] = float("inf")
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    monkeypatch.setattr(SpeechDistillation, "train_step", damaged_by_something)
    message = one_line(tiny(speech, teacher_file, tmp_path, **{"checkpoint.save_interval_updates": 1}))
    assert re.match(PLACE, message).groups()[:3] == ("5", "2", "loss (nan)")
    assert the_last_good_checkpoint(tmp_path)


def test_a_teacher_whose_output_is_not_finite_is_named_as_the_cause(speech, teacher_file, tmp_path):
    state = load(teacher_file)
    state["model"]["encoder.layers.6.fc1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "teacher.pt")
    message = one_line(tiny(speech, tmp_path / "teacher.pt", tmp_path))
    assert re.match(PLACE, message).groups()[:3] == ("0", "1", "output of teacher layer 8, 12")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line(speech, teacher_file, tmp_path):
    message = one_line(tiny(speech, teacher_file, tmp_path, **{"+criterion.output_weight": 1.0e36}))
    assert re.match(PLACE, message)[3].startswith("gradient (norm ")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loss_scale_at_its_minimum_is_explained(speech, teacher_file, tmp_path):
    # Automatic mixed precision, because the rest of fp16 needs a GPU.
    amp = {
        "common.amp": True,
        "common.amp_init_scale": 2**62,
        "common.min_loss_scale": 2**62,
        "+criterion.output_weight": 1.0e22,
    }
    message = one_line(tiny(speech, teacher_file, tmp_path, **amp))
    assert re.match(PLACE, message)[3] == "gradient in fp16 at every loss scale"
    assert "lower optimization.lr" in message
    assert not list((tmp_path / "checkpoints").iterdir())


def test_data_workers_do_not_wait_for_a_next_epoch(monkeypatch, speech, teacher_file, tmp_path):
    # The garbage collector, which finds those that wait, takes 5 s for each.
    loaders = []

    class Remembered(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaders.append(self)

    monkeypatch.setattr(torch.utils.data, "DataLoader", Remembered)
    train(
        "librispeech_base",
        tiny(speech, teacher_file, tmp_path, **{"dataset.num_workers": 1, "checkpoint.no_save": True}),
    )
    assert loaders and not any(loader.persistent_workers for loader in loaders)


@pytest.fixture(scope="module")
def our_run(speech, teacher_file, tmp_path_factory):
    """A training of this package. From then on, fairseq's epochs in this process are guarded."""
    fields = {"optimization.max_update": 1, "model.stack_stages": 1, "model.stack_method": "none"}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path_factory.mktemp("run"), **fields))


def epochs(batches=((0, 1), (2,), (3,), (4, 5)), **options):
    return iterators.EpochBatchIterator(Numbers(), collate_fn=list, batch_sampler=list(batches), **options)


def place_after_one_batch():
    iterator = epochs()
    next(iterator.next_epoch_itr())
    return iterator.state_dict()


@pytest.mark.usefixtures("our_run")
def test_an_epoch_of_the_same_batches_is_gone_through_to_its_end():
    resumed = epochs()
    resumed.load_state_dict(place_after_one_batch())
    assert (resumed.epoch, resumed.iterations_in_epoch) == (1, 1)
    assert len(list(resumed.next_epoch_itr())) == 3


@pytest.mark.usefixtures("our_run")
@pytest.mark.parametrize(
    "options",
    [{"num_shards": 2}, {"batches": [[0, 1, 2], [3, 4, 5]]}, {"batches": [[5, 1], [2], [3], [4, 0]]}, {"seed": 2}],
    ids=["processes", "batch size", "recordings", "seed"],
)
def test_an_epoch_of_other_batches_is_left_for_the_next(options):
    resumed = epochs(**options)
    resumed.load_state_dict(place_after_one_batch())
    assert (resumed.epoch, resumed.iterations_in_epoch) == (2, 0)


@pytest.mark.usefixtures("our_run")
def test_a_place_behind_the_end_of_an_epoch_needs_no_layout():
    resumed = epochs(batches=[[0, 1, 2, 3, 4, 5]])
    state = place_after_one_batch()
    del state["layout"]
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.iterations_in_epoch) == (2, 0)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index
