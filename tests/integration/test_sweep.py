"""Trainings that follow each other in one process know nothing of each other."""

import os
import signal

import pytest
import torch
from fork_server import ForkServer
from training import EXAMPLES, ROOT, tiny

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.errors import Preempted
from fairseq_stack.training import preemption
from fairseq_stack.training.progress import CLOCKS

# The first is the best by far: the others' losses would be no news, and end the patience.
RATES = ("[0.02]", "[0.0001]", "[0.001]")
SPEED = ("wps", "ups", "wall", "train_wall", *CLOCKS)


def log_of(folder):
    """{scalar: [(update, value), ...]} without speed."""
    return {
        f"{part}/{name}": list(zip(series.updates.tolist(), series.values.tolist()))
        for part in ("train_inner", "valid")
        for name, series in read_scalars(folder / "run/tensorboard" / part).items()
        if name not in SPEED
    }


def checkpoints_of(folder):
    paths = (folder / "run/checkpoints").iterdir()
    return {path.name: torch.load(path, weights_only=True)["model"] for path in paths if path.suffix == ".pt"}


def test_each_job_of_a_sweep_is_what_it_is_alone(speech, teacher_file, tmp_path):
    fields = {"model.stack_stages": 2, "optimization.max_update": 6, "checkpoint.patience": 2, "dataset.batch_size": 8,
              "dataset.validate_interval_updates": 2, "common.log_file": "log.txt"}  # fmt: skip
    command = ["--config-dir", EXAMPLES / "interleaved", "--config-name", "librispeech_base",
               *tiny(speech, teacher_file, "run", **fields), f"common.user_dir={ROOT}/fairseq_stack"]  # fmt: skip
    sweep = [
        f"optimization.lr={','.join(RATES)}",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.sweep.subdir=${hydra.job.num}",
    ]
    with ForkServer() as server:
        assert server.command(["-m", *command, *sweep], tmp_path / "sweep.log") == 0, (
            tmp_path / "sweep.log"
        ).read_text()
        for job in (1, 2):
            single = [f"optimization.lr={RATES[job]}", f"hydra.run.dir={tmp_path}/single{job}"]
            assert server.command([*command, *single], tmp_path / "single.log") == 0
    for job in (1, 2):
        swept, single = tmp_path / f"sweep/{job}", tmp_path / f"single{job}"
        ours, theirs = checkpoints_of(swept), checkpoints_of(single)
        assert ours.keys() == theirs.keys() and "checkpoint_best.pt" in ours
        for name, weights in theirs.items():
            assert all(torch.equal(ours[name][key], value) for key, value in weights.items())
        assert log_of(swept) == log_of(single)
        assert (swept / "log.txt").read_text().count("done training") == 1


def test_a_sigterm_ends_one_program_and_counts_once():
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.listen()  # the next training of a sweep begins
        assert preemption.requested()
        with pytest.raises(Preempted):
            preemption.stop()
        assert not preemption.requested()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_submitits_signal_lets_the_training_save_before_submitit_requeues_the_job(monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    requeued = []

    def requeue(number, frame):
        requeued.append(preemption.received())
        raise SystemExit(-1)

    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR2)]
    try:
        signal.signal(signal.SIGUSR2, requeue)
        preemption.listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        preemption.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() and not requeued
        with pytest.raises(SystemExit):
            preemption.stop()
        assert requeued == ["SIGUSR2"]
        preemption.unlisten()
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        for number, handler in before:
            signal.signal(number, handler)
