"""A run that is stopped and resumed is the uninterrupted run, bit for bit."""

import copy
from dataclasses import dataclass, field
from itertools import combinations, product

import pytest
import torch
from training import configuration, tiny, train, train_configuration

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.tasks.speech_distillation import SpeechDistillation
from fairseq_stack.training.progress import CLOCKS

SPEED = ("wps", "ups", "wall", "train_wall", *CLOCKS)
UPDATES = 10
EPOCH_END, MID_EPOCH = 6, 4  # 24 recordings in batches of 4: epochs of 6 updates, or of 3 with accumulation

METHODS = {
    "interleaved": {"model.stack_stages": 4},
    "gradual": {"model.stack_stages": 4},
    "midas": {"model.stack_stages": 4},
    "stackbert": {"model.stack_stages": 3},
    "gstack": {"model.stack_stages": 4},
    "none": {"model.stack_stages": 1},
}
PLATEAU = {
    "model.stack_schedule": "plateau",
    "model.stack_alpha": 0,
    "+model.stack_patience": 1,
    "optimization.lr": "[0.2]",  # far too much, so that the loss soon rises
    "dataset.disable_validation": False,
    "checkpoint.save_interval_updates": 1,  # fairseq validates before it saves
}
SCHEDULES = {
    "equal": {"model.stack_schedule": "equal"},
    "prop": {"model.stack_schedule": "prop", "model.stack_alpha": 0.5},
    "milestones": {"model.stack_schedule": "milestones"},
    "plateau": PLATEAU,
    "patient plateau": {**PLATEAU, "+model.stack_patience": 2, "+model.stack_min_updates": 3},
}
MILESTONES = {"interleaved": "[2,5,9]", "gradual": "[3,4,8]", "midas": "[4,7,8]", "stackbert": "[2,8]", "gstack": "[6]"}
LOADING = {
    "0 workers": {},
    "2 workers": {"dataset.num_workers": 2},
    "accumulation": {"optimization.update_freq": "[2]"},
    "2 workers, accumulation": {"dataset.num_workers": 2, "optimization.update_freq": "[2]"},
    "0 workers, cropped": {"task.max_sample_size": 5000},
}
AVERAGES = {
    "no average": {},
    "average": {"ema.store_ema": True, "ema.ema_decay": 0.9},
    "fp32 average": {"ema.store_ema": True, "ema.ema_decay": 0.9, "ema.ema_fp32": True},
    "late average": {"ema.store_ema": True, "ema.ema_decay": 0.9, "ema.ema_fp32": True, "ema.ema_start_update": 6},
    "rare average": {"ema.store_ema": True, "ema.ema_decay": 0.9, "ema.ema_fp32": True, "ema.ema_update_freq": 2},
}
PRECISIONS = {
    "fp32": {},
    "fp32, masks": {"+task.mask_prob": 0.5},
    "fp32, reset moments": {"model.stack_optimizer_state": "reset"},
    "bf16": {"common.bf16": True},
    "memory-efficient bf16": {"common.bf16": True, "common.memory_efficient_bf16": True},
}
MUON = {"optimizer._name": "muon"}
MUON_PRECISIONS = {
    "fp32, Muon, silent copies": {**MUON, "+model.stack_silent_copies": True},
    "bf16, Muon, reset moments": {**MUON, **PRECISIONS["bf16"], **PRECISIONS["fp32, reset moments"]},
}
# Each run learns its own clusters, and its store grows with it.
UNITS = {
    "bf16, units of masked frames": {
        **PRECISIONS["bf16"],
        "+criterion.loss": "units",
        "+task.target_format": "units20",
        "+task.target_store": "store",
        "+task.mask_prob": 0.5,
    }
}
STOPS = {
    "at epoch end": lambda growths: [EPOCH_END],
    "in mid-epoch": lambda growths: [MID_EPOCH],
    "before each growth": lambda growths: [update - 1 for update in growths],
    "at each growth": lambda growths: list(growths),
    "after each growth": lambda growths: [update + 1 for update in growths],
}


FACTORS = [list(METHODS)[:5], *map(list, (STOPS, SCHEDULES, LOADING, AVERAGES, PRECISIONS))]


def cells():
    """An orthogonal array of 25 runs in six factors of five levels: any two levels of two factors meet once.

    Row (a, b) holds a, b, a + b, a + 2 b, a + 3 b and a + 4 b modulo 5. The method without growth follows,
    which has no schedule, and then another optimizer.
    """
    for a in range(5):
        for b in range(5):
            levels = (a, b, *((a + factor * b) % 5 for factor in (1, 2, 3, 4)))
            yield tuple(factor[level] for factor, level in zip(FACTORS, levels))
    yield "none", "in mid-epoch", "equal", "2 workers", "average", "fp32"
    yield "none", "at epoch end", "equal", "2 workers, accumulation", "no average", "bf16"
    yield "interleaved", "at each growth", "equal", "2 workers", "average", "fp32, Muon, silent copies"
    yield "midas", "after each growth", "milestones", "accumulation", "fp32 average", "bf16, Muon, reset moments"
    yield "interleaved", "at each growth", "prop", "0 workers, cropped", "average", "bf16, units of masked frames"


def test_every_level_of_each_factor_meets_every_level_of_each_other():
    for one, other in combinations(range(len(FACTORS)), 2):
        met = {(cell[one], cell[other]) for cell in cells()}
        assert met >= set(product(FACTORS[one], FACTORS[other]))
    assert {cell[0] for cell in cells()} == set(METHODS)


@dataclass
class Watch:
    """Stops a training before it goes beyond an update, and remembers where it grew."""

    stop: int = None
    growths: list = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch):
    seen = Watch()
    train_step, grow = SpeechDistillation.train_step, SpeechDistillation.grow

    def stopped(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == seen.stop:
            raise KeyboardInterrupt
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    def watched(task, sample, model, criterion, optimizer, update_num, ema_model):
        seen.growths.append(update_num)
        grow(task, sample, model, criterion, optimizer, update_num, ema_model)

    monkeypatch.setattr(SpeechDistillation, "train_step", stopped)
    monkeypatch.setattr(SpeechDistillation, "grow", watched)
    return seen


def flat(state, prefix=""):
    """{path: tensor or plain value} of nested dicts and lists."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def differences(ours, theirs):
    """Paths where two nested states are not the same to the last bit; two NaN count as the same."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    return [path for path in ours if not _same(ours[path], theirs[path])]


def _same(one, other):
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=1e30), other.nan_to_num(nan=1e30))
    return one == other


def whole_state(folder):
    """Everything that a run's last checkpoint says about it; not clocks, paths, the list of starts and meters that nobody logs."""
    state = torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=True)
    meters = state["extra_state"].pop("metrics")
    meters = {name: [meter for meter in meters[name] if meter[1] not in SPEED] for name in ("train", "train_inner")}
    del state["extra_state"]["previous_training_time"], state["cfg"]
    state["optimizer_history"] = state["optimizer_history"][-1]
    return {**state, "metrics": meters}


def logged(folder):
    """{scalar: [(update, value), ...]} of everything that was logged but speed."""
    return {
        f"{part}/{name}": list(zip(series.updates.tolist(), series.values.tolist()))
        for part in ("train_inner", "train", "valid")
        if (folder / "tensorboard" / part).exists()
        for name, series in read_scalars(folder / "tensorboard" / part).items()
        if name not in SPEED
    }


@pytest.mark.parametrize(
    "method, stop, schedule, loading, average, precision", [pytest.param(*cell, id=", ".join(cell)) for cell in cells()]
)
def test_a_stopped_run_ends_as_the_uninterrupted_one(
    method, stop, schedule, loading, average, precision, watch, speech, teacher_file, tmp_path
):
    fields = {
        "model.encoder_layers": 8,
        "model.stack_method": method,
        "criterion.teacher_layers": "[6,12]",
        "optimization.max_update": UPDATES,
        "common.log_interval": 4,  # does not divide the epochs: means in the log go on over their ends
        "dataset.disable_validation": True,
        "dataset.batch_size_valid": 6,
        **METHODS[method],
        **SCHEDULES[schedule],
        **LOADING[loading],
        **AVERAGES[average],
        **{**PRECISIONS, **MUON_PRECISIONS, **UNITS}[precision],
    }
    if schedule == "milestones":
        fields["+model.stack_milestones"] = MILESTONES[method]
    # Composed once, because that takes a third of such a short run.
    composed = configuration("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))

    def run(folder, stop=None):
        cfg = copy.deepcopy(composed)
        cfg.checkpoint.save_dir, cfg.common.tensorboard_logdir = f"{folder}/checkpoints", f"{folder}/tensorboard"
        if cfg.task.target_store:
            cfg.task.target_store = f"{folder}/store"
        if schedule not in ("plateau", "patient plateau"):
            cfg.checkpoint.save_interval_updates = stop or 0
        watch.stop = stop
        return train_configuration(cfg)

    student = run(tmp_path / "whole").get_model()
    growths, watch.growths = watch.growths, []
    assert len(growths) == len(student.plan.growths)
    assert student.layer_norm.weight.dtype == (torch.bfloat16 if "bf16" in precision else torch.float32)
    for update in STOPS[stop](growths):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", update)
        last = torch.load(tmp_path / "stopped/checkpoints/checkpoint_last.pt", weights_only=True)
        assert last["optimizer_history"][-1]["num_updates"] == update
    run(tmp_path / "stopped")

    assert watch.growths == growths
    whole, resumed = (whole_state(tmp_path / name) for name in ("whole", "stopped"))
    assert whole["last_optimizer_state"]["state"] and ("ema" in whole["extra_state"]) == bool(AVERAGES[average])
    assert not differences(whole, resumed)
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


def test_a_changed_batch_size_goes_on_with_the_next_epoch_and_says_so(
    speech, teacher_file, tmp_path, monkeypatch, caplog
):
    heard, train_step = {}, SpeechDistillation.train_step

    def listened(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        heard[update_num] = sample["utterances"]
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    def run(folder, updates, size):
        fields = {"optimization.max_update": updates, "dataset.batch_size": size, "model.stack_method": "none",
                  "model.stack_stages": 1, "lr_scheduler.total_num_update": 20}  # fmt: skip
        return train("librispeech_base", tiny(speech, teacher_file, folder, **fields))

    monkeypatch.setattr(SpeechDistillation, "train_step", listened)
    caplog.set_level("INFO")
    run(tmp_path / "whole", 6, 8)
    second_epoch = [heard[update] for update in (3, 4, 5)]
    run(tmp_path / "stopped", MID_EPOCH, 4)
    assert "resume | " not in caplog.text
    assert run(tmp_path / "stopped", MID_EPOCH + 3, 8).get_num_updates() == MID_EPOCH + 3
    assert [heard[update] for update in (4, 5, 6)] == second_epoch
    assert "epoch 1 had 6 batches (processes: 1) and has 3 batches (processes: 1) now" in caplog.text
    assert "resumes at the start of epoch 2" in caplog.text
