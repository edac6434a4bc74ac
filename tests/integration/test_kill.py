"""A run that is killed at any moment, and started again, ends as if nothing had happened."""

import os
import re
import signal
import time

import pytest
import torch
from fork_server import ForkServer
from killing import Killer, cut_off, same_state
from training import tiny, train

from fairseq_stack.training import growth_listeners


@pytest.fixture(scope="module")
def server():
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def killer(server, speech, teacher_file, tmp_path_factory):
    return Killer(server, speech, teacher_file, tmp_path_factory.mktemp("kills"), seed=1)


def test_fifty_kills_at_random_moments_change_nothing(killer):
    number, logs = 0, ""
    # As long as it takes until growths, too, were among the updates that had to be done again.
    while killer.kills < 50 or len(re.findall(r"growth \| update", logs)) <= 3 * number:
        killer.kill_until_finished(killer.new_run(f"run{number}"))
        logs += killer.log(killer.folder / f"run{number}")
        number += 1
    assert killer.resumes == killer.kills >= 50 and killer.finished == number
    assert killer.lost == 0 and killer.different == 0


def die_in_growth(config, overrides):
    """A training that is killed when a growth has copied the weights and not yet the optimiser's state."""
    growth_listeners.copy_optimizer_state = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train(config, overrides)


def test_a_kill_in_the_middle_of_a_growth_changes_nothing(killer, server, speech, teacher_file):
    run = killer.new_run("growth")
    overrides = tiny(speech, teacher_file, run, **{"checkpoint.save_interval_updates": 1})
    server.call(die_in_growth, "librispeech_base", overrides, log=run / "log")
    assert server.wait() == -signal.SIGKILL
    assert killer.start(run) == 0, killer.log(run)
    assert re.search(r"Loaded checkpoint \S+ \(epoch \d+ @ 2 updates\)", killer.log(run))
    assert same_state(run, killer.reference)


def test_copies_that_are_cut_off_too_change_nothing(killer):
    run = killer.new_run("cut")
    different = killer.different
    killer.kill_until_finished(run, faults=[cut_off], fault_rate=1, most=3)
    assert killer.different == different
    log = killer.log(run)
    assert re.search(r"recovery \| skipped \S+checkpoint_last.pt: \S.*; it is now checkpoint_last.pt.broken", log)
    assert re.search(r"recovery \| checkpoint_\S+.pt at update \d+ is the newest whole checkpoint and becomes", log)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_is_told_to_end_saves_a_checkpoint_and_goes_on_exactly(
    killer, server, speech, teacher_file, tmp_path, workers
):
    told = Killer(server, speech, teacher_file, tmp_path, seed=2, workers=workers, reference=killer)
    run = told.new_run("run")
    told.kill_until_finished(run, number=signal.SIGTERM, expected=143, most=4)
    assert told.kills > 0 and told.lost == 0 and told.different == 0
    assert "Traceback" not in told.log(run)


def test_the_checkpoint_of_a_job_that_is_told_to_end_is_of_its_last_update(server, speech, teacher_file, tmp_path):
    # Without this checkpoint there would be none before the end.
    fields = {
        "optimization.max_update": 100_000,
        "checkpoint.save_interval": 100_000,
        "dataset.disable_validation": True,
    }
    log = tmp_path / "log"
    pid = server.start("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields), log)
    while "num_updates=3," not in log.read_text():
        time.sleep(0.02)
    assert not list(tmp_path.rglob("*.pt"))
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 143
    assert "Traceback" not in log.read_text()
    done = int(re.findall(r"num_updates=(\d+)", log.read_text())[-1])
    state = torch.load(tmp_path / "checkpoints/checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == done
