"""A configuration with which no training can start, or none that ends well, is answered in one line at the start."""

import re

import numpy as np
import pytest
import torch
from fairseq.data.data_utils import batch_by_size
from fairseq.dataclass.configs import FairseqConfig
from fairseq.registry import REGISTRIES
from omegaconf import OmegaConf, open_dict
from training import EXAMPLES, completed, composed, configuration, run_training, tiny, train

from fairseq_stack.errors import InputError, input_errors, one_line_errors
from fairseq_stack.models.stacked_hubert import StackedHubertConfig
from fairseq_stack.tasks.speech_distillation import SpeechDistillation, SpeechDistillationConfig
from fairseq_stack.training.recipes import compose_recipe
from fairseq_stack.training.start_checks import check_configuration

# fairseq 0.12.2 keeps a last batch that is no multiple of dataset.required_batch_size_multiple.
LEAVES_OUT = len(batch_by_size(np.arange(3), lambda _: 1, max_sentences=2, required_batch_size_multiple=2)) == 1


@pytest.fixture(scope="module")
def recipe(speech, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return configuration("librispeech_base", tiny(speech, teacher_file, folder))


@pytest.fixture
def line(recipe, monkeypatch):
    """Start fairseq's training with changed fields; returns the line that it ends with, before anything is loaded."""
    monkeypatch.setattr(SpeechDistillation, "setup_task", lambda *_: pytest.fail("the configuration went through"))

    def start(fields):
        cfg = OmegaConf.create(OmegaConf.to_container(recipe))
        for field, value in fields.items():
            group, name = field.split(".")
            with open_dict(cfg):
                cfg[group][name] = value
        with pytest.raises(SystemExit) as ended:
            one_line_errors(lambda: run_training(completed(cfg)))()
        assert "\n" not in ended.value.code
        return ended.value.code

    return start


CASES = [
    # numbers
    ({"dataset.batch_size": 0}, "dataset.batch_size=0 must be 1 or more"),
    ({"dataset.batch_size_valid": -3}, "dataset.batch_size_valid=-3 must be"),
    ({"dataset.max_tokens": 0}, "dataset.max_tokens=0 must be"),
    ({"dataset.batch_size": None}, "dataset.batch_size and dataset.max_tokens are missing"),
    ({"dataset.required_batch_size_multiple": 0}, "dataset.required_batch_size_multiple=0 must be"),
    ({"dataset.num_workers": -1}, "dataset.num_workers=-1 must be 0 or more"),
    ({"dataset.max_valid_steps": -1}, "dataset.max_valid_steps=-1 must be"),
    ({"dataset.validate_interval": 0}, "dataset.validate_interval=0 must be"),
    ({"checkpoint.save_interval": 0}, "checkpoint.save_interval=0 must be"),
    ({"checkpoint.keep_interval_updates_pattern": 0}, "checkpoint.keep_interval_updates_pattern=0 must be"),
    ({"common.log_interval": 0}, "common.log_interval=0 must be 1 or more"),
    ({"common.seed": -1}, "common.seed=-1 must lie between 0 and"),
    ({"optimization.update_freq": []}, "optimization.update_freq=[] must be a list of one or more numbers"),
    ({"optimization.update_freq": [2, 0]}, "optimization.update_freq=[2, 0] must be"),
    ({"optimization.lr": []}, "optimization.lr=[] must be"),
    ({"optimization.lr": [float("nan")]}, "optimization.lr=[nan] must be"),
    ({"optimization.clip_norm": -1.0}, "optimization.clip_norm=-1.0 must be 0 or more"),
    ({"optimization.max_epoch": -1}, "optimization.max_epoch=-1 must be"),
    ({"ema.ema_update_freq": 0}, "ema.ema_update_freq=0 must be"),
    # names
    ({"optimizer._name": "adm"}, "optimizer._name=adm is unknown; the most similar names are adam"),
    ({"optimizer._name": None}, "optimizer._name=None is unknown"),
    ({"lr_scheduler._name": "polynomial"}, "the most similar names are polynomial_decay"),
    ({"task._name": "distillation"}, "the most similar names are speech_distillation"),
    ({"model._name": "stacked-hubert"}, "the most similar names are stacked_hubert"),
    ({"criterion._name": "layer_distil"}, "the most similar names are layer_distillation"),
    # fields
    ({"lr_scheduler._name": "cosine"}, "is no field of lr_scheduler._name=cosine; take it out (~lr_scheduler."),
    ({"optimizer._name": "nag"}, "optimizer.adam_betas is no field of optimizer._name=nag; take it out (~optimizer."),
    ({"optimizer.adam_epsilon": 1.0}, "optimizer.adam_epsilon is no field of optimizer._name=adamw; take it out"),
    ({"optimizer.adam_eps": "abc"}, "optimizer.adam_eps: Value 'abc'"),
    ({"lr_scheduler.warmup_updates": "abc"}, "lr_scheduler.warmup_updates: Value 'abc'"),
    ({"model.dropout": "abc"}, "model.dropout: Value 'abc'"),
    # what is not there
    ({"common.fp16": True}, "common.fp16=true needs a GPU"),
    ({"common.fp16": True, "common.amp": True}, "common.fp16=true and common.amp=true exclude each other"),
    ({"common.bf16": True, "common.amp": True}, "common.bf16=true and common.amp=true exclude each other"),
    ({"checkpoint.write_checkpoints_asynchronously": True}, "needs iopath, which is not installed"),
    ({"common.tpu": True}, "common.tpu=true needs torch_xla"),
    ({"distributed_training.distributed_world_size": 2}, "distributed_world_size=2 is more than this machine's GPUs"),
    ({"distributed_training.ddp_backend": "fully_sharded"}, "ddp_backend=fully_sharded is not supported"),
    ({"distributed_training.zero_sharding": "os"}, "zero_sharding=os is not supported"),
    ({"optimization.grad_clip": 1.0}, "optimization.grad_clip is no field of fairseq; the most similar ones are"),
    # files
    ({"checkpoint.save_dir": ""}, "checkpoint.save_dir is empty"),
    ({"checkpoint.save_dir": "/proc/none"}, "checkpoint.save_dir=/proc/none cannot be written to"),
    ({"checkpoint.save_dir": __file__}, f"{__file__} is no folder"),
    ({"common.tensorboard_logdir": f"{__file__}/logs"}, f"{__file__} is no folder"),
    ({"common.log_file": "/no/such/folder/log"}, "common.log_file=/no/such/folder/log must be a file in a folder"),
    ({"checkpoint.optimizer_overrides": "abc"}, "checkpoint.optimizer_overrides=abc must be a dict"),
]


@pytest.mark.parametrize("fields, message", CASES, ids=[" ".join(map(str, fields.items())) for fields, _ in CASES])
def test_what_cannot_be_is_said_before_anything_is_loaded(line, fields, message):
    said = line(fields)
    assert said.startswith("error: ") and message in said


def test_every_recipe_that_a_cpu_can_train_passes(recipe):
    check_configuration(recipe)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dataset.max_tokens": 5000, "dataset.batch_size": "null"}, r"dataset.max_tokens=5000 is less than the (\d+) samples of \S+train\d+.flac; raise it to \1 or more, or lower task.max_sample_size=250000"),
        ({"dataset.max_tokens_valid": 5000}, r"dataset.max_tokens_valid=5000 is less than the \d+ samples of \S+valid\d+.flac"),
        ({"checkpoint.best_checkpoint_metric": "accuracy"}, "checkpoint.best_checkpoint_metric=accuracy is unknown; choose from loss, output_loss, intermediate_loss, layer_4"),
        ({"optimizer.adam_betas": "abc"}, r"fairseq cannot build the optimizer .*optimizer.adam_betas=abc.*NameError"),
        ({"optimizer.adam_betas": "'(0.9,1.5)'"}, r"fairseq cannot build .*optimizer.adam_betas=\(0.9, 1.5\) must be from 0 to below 1"),
        ({"lr_scheduler.total_num_update": 0}, r"fairseq cannot build .*lr_scheduler.total_num_update=0"),
        # omegaconf 2.0, beside fairseq 0.12.2, reads a field that is missing as None.
        ({"optimizer._name": "sgd"}, r"fairseq cannot build .*optimizer._name=sgd.*: (optimizer.lr is missing; add \+optimizer.lr=VALUE|TypeError)"),
        ({"optimization.skip_remainder_batch": True, "optimization.update_freq": "[9]"}, r"optimization.skip_remainder_batch=true leaves out all 6 batches of an epoch with optimization.update_freq=\[9\]"),
    ],
)  # fmt: skip
def test_what_needs_the_data_or_the_model_is_said_before_the_first_update(
    speech, teacher_file, tmp_path, fields, message
):
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    assert re.match(f"error: {message}", ended.value.code) and "\n" not in ended.value.code
    assert not list(tmp_path.rglob("*.pt"))


def test_models_that_do_not_grow_may_lie_in_shards(recipe):
    cfg = OmegaConf.create(OmegaConf.to_container(recipe))
    with open_dict(cfg):
        cfg.distributed_training.zero_sharding, cfg.model = "os", {"_name": "hubert_ctc"}
    check_configuration(cfg)


def test_a_crop_that_fits_max_tokens_is_enough(speech, teacher_file, tmp_path):
    fields = {
        "dataset.max_tokens": 5000,
        "dataset.batch_size": "null",
        "task.max_sample_size": 5000,
        "optimization.max_update": 7,
    }
    assert train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).get_num_updates() == 7


def test_recordings_that_no_batch_has_place_for_are_counted(speech, teacher_file, tmp_path, caplog):
    fields = {"dataset.required_batch_size_multiple": 5, "dataset.batch_size": 5}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    lines = [message for message in caplog.messages if "leaves out" in message]
    assert lines == [
        f"dataset.required_batch_size_multiple=5 leaves out {left} recordings of {split}, the longest; set it to 1"
        for left, split in ((("4 of the 24", "train"), ("1 of the 6", "valid")) if LEAVES_OUT else ())
    ]


@pytest.mark.skipif(not LEAVES_OUT, reason="fairseq 0.12.2 leaves no recording out")
def test_a_subset_that_no_batch_has_place_for_is_named(speech, teacher_file, tmp_path):
    fields = {"dataset.required_batch_size_multiple": 8, "dataset.batch_size": 8}
    line = "dataset.required_batch_size_multiple=8 leaves out 6 of the 6 recordings of valid, the longest; set it to 1"
    with pytest.raises(SystemExit, match=f"^error: {line}$"):
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))


def test_the_metrics_to_choose_from_are_those_that_a_validation_logs(speech, teacher_file, tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(SpeechDistillation, "post_validate", lambda task, model, stats, agg: logged.update(stats))
    fields = {"optimization.max_update": 7, "checkpoint.best_checkpoint_metric": "layer_8", "checkpoint.no_save": True}
    criterion = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).get_criterion()
    assert set(logged) - {"wps", "wpb", "bsz", "num_updates", "best_layer_8"} == set(criterion.validation_metrics)


# The README's rule of the plus sign


def test_fields_that_a_recipe_does_not_name_need_a_plus_in_five_groups_and_in_no_other():
    named = composed("librispeech_base", [])
    plain, five = [], {"task": SpeechDistillationConfig, "model": StackedHubertConfig}
    for group in ("criterion", "optimizer", "lr_scheduler"):
        five[group] = REGISTRIES[group]["dataclass_registry"][named[group]._name]
    for group, field in FairseqConfig.__dataclass_fields__.items():
        if hasattr(field.type, "__dataclass_fields__"):
            plain += [
                f"{group}.{name}=null"
                for name in fields_of(field.type)
                if "Optional" in str(field.type.__annotations__[name])
            ]
            assert group not in five
    assert {override.split(".")[0] for override in plain} >= {"common", "dataset", "optimization", "checkpoint"}
    composed("librispeech_base", plain)
    for group, dataclass in five.items():
        unnamed = [name for name in fields_of(dataclass) if name not in list(named[group].keys())]
        assert unnamed
        composed("librispeech_base", [f"+{group}.{name}=null" for name in unnamed])
        with pytest.raises(Exception, match=f"Could not override '{group}.{unnamed[0]}'"):
            composed("librispeech_base", [f"{group}.{unnamed[0]}=null"])


def fields_of(dataclass):
    return [name for name in dataclass.__dataclass_fields__ if not name.startswith("_")]


@pytest.mark.parametrize("override, line", [
    ("+task.nothing=3", "task.nothing is no field of task._name=speech_distillation"),
    ("task.max_sample_size=long", "task.max_sample_size: Value 'long'"),
    ("+optimizer.nothing=1", "optimizer.nothing is no field of optimizer._name=adam"),
])  # fmt: skip
def test_a_recipe_that_a_program_composes_is_answered_as_the_commands(override, line):
    with pytest.raises(InputError, match=f"^{line}"):
        compose_recipe(EXAMPLES / "interleaved", "librispeech_base", ["task.data=x", "task.teacher=y", override])


@pytest.mark.parametrize("status, code", [(1, 1), (-9, "error: process 0 terminated with signal SIGKILL")])
def test_a_process_that_has_ended_ends_the_job_with_a_reason(monkeypatch, recipe, status, code):
    """fairseq starts a process for each GPU; one prints its reason, unless a signal has ended it."""
    text = "process 0 terminated with signal SIGKILL" if status < 0 else "process 0 terminated with exit code 1"

    def spawn(*args, **kwargs):
        raise torch.multiprocessing.ProcessExitedException(text, error_index=0, error_pid=1, exit_code=status)

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    cfg = OmegaConf.create(OmegaConf.to_container(recipe))
    cfg.distributed_training.distributed_init_method = "tcp://localhost:1"
    with pytest.raises(SystemExit) as ended:
        run_training(cfg)
    assert ended.value.code == code


def test_the_reason_of_another_librarys_error_is_its_first_line_that_says_something():
    with pytest.raises(InputError, match="^no shards: ImportError Please install fairscale$"):
        with input_errors("no shards"):
            raise ImportError("\n\nPlease install fairscale\n\n")
