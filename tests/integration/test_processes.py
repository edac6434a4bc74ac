"""Two processes that train one student, through fairseq's own command."""

import re
import shutil
import signal
from functools import partial

import pytest
import torch
from fork_server import ForkServer
from killing import same_state
from processes import (
    damage_before,
    end_torchrun_before,
    free_port,
    kill_one_of_torchruns_before,
    record,
    recover_late,
    save_late,
    signal_before,
    start_job,
    start_under_torchrun,
    train_under_torchs_ddp,
    wait,
)
from training import tiny, train

UPDATES, GROWTHS = 14, [1, 4, 8]  # PROP-1
# Without dropout, as one process draws other numbers for its second batch than a second process for its first.
FIELDS = {
    "optimization.max_update": UPDATES,
    "dataset.disable_validation": True,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
}
EVERY_UPDATE = {"checkpoint.save_interval_updates": 1}


def load(path):
    return torch.load(path, weights_only=True)


def assert_close(ours, theirs, what):
    """Equal but for rounding in fp32, gradients as small as 1e-4 of the largest count as zero."""
    size = max(value.abs().max() for value in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * size, msg=f"{name}, {what}")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def log(folder, rank=0):
    return (folder / f"rank{rank}.log").read_text()


@pytest.fixture(scope="module")
def server():
    with ForkServer() as running:
        yield running


@pytest.fixture
def job(server, speech, teacher_file, tmp_path):
    """Runs the two processes of a job to its end and gives their exit codes."""

    def run(fields, misfortunes=None, data=speech, folder=tmp_path):
        overrides = tiny(data, teacher_file, folder, **{**FIELDS, **fields})
        return wait(start_job(server, "librispeech_base", overrides, folder, misfortunes))

    return run


@pytest.fixture(scope="module")
def finished(server, speech, teacher_file, tmp_path_factory):
    """An uninterrupted job of two processes."""
    folder = tmp_path_factory.mktemp("two")
    codes = wait(start_job(server, "librispeech_base", tiny(speech, teacher_file, folder, **FIELDS), folder))
    assert codes == [0, 0], log(folder)
    return folder


# The same weights, the same gradient


def test_all_processes_hold_the_same_weights_after_each_growth_and_the_same_gradients(finished):
    for update in GROWTHS:
        assert_equal(*(load(finished / f"rank{rank}-grown{update}.pt") for rank in (0, 1)))
    for update in range(UPDATES):
        assert_equal(*(load(finished / f"rank{rank}-gradient{update}.pt") for rank in (0, 1)))


def assert_same_gradients(one, two, updates):
    for update in range(updates):
        ours, theirs = (load(folder / f"rank0-gradient{update}.pt") for folder in (two, one))
        assert_close(ours, theirs, f"update {update}")
        # Of the layers that no stage has reached, legacy_ddp makes gradients of zero.
        assert not any(ours[name].any() for name in ours.keys() - theirs.keys())


def test_the_gradient_of_two_processes_is_that_of_accumulation_in_one(
    finished, speech, teacher_file, tmp_path, monkeypatch
):
    record(tmp_path, 0, monkeypatch.setattr)
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **FIELDS, **{"optimization.update_freq": "[2]"}))
    assert_same_gradients(tmp_path, finished, UPDATES)


def test_the_gradient_of_two_processes_is_that_of_one_on_the_joined_batch(
    job, speech, teacher_file, tmp_path, monkeypatch
):
    # All 24 recordings make one batch, or two.
    short = {"optimization.max_update": 4, "model.stack_stages": 2, "checkpoint.no_save": True}
    assert job({**short, "dataset.batch_size": 12}) == [0, 0], log(tmp_path)
    assert (tmp_path / "rank1-grown1.pt").exists()
    (tmp_path / "one").mkdir()
    record(tmp_path / "one", 0, monkeypatch.setattr)
    fields = {**FIELDS, **short, "dataset.batch_size": 24}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "one", **fields))
    assert_same_gradients(tmp_path / "one", tmp_path, 4)


def test_under_torchs_ddp_too_the_gradient_is_that_of_one_on_the_joined_batch_before_and_after_a_growth(
    server, speech, teacher_file, tmp_path
):
    overrides, port = tiny(speech, teacher_file, tmp_path, **FIELDS), free_port()
    places = [(0, 2), (1, 2), (0, 1)]
    started = [
        server.call(train_under_torchs_ddp, *place, port, overrides, tmp_path, log=tmp_path / "log") for place in places
    ]
    assert wait(started) == [0, 0, 0], (tmp_path / "log").read_text()
    for stage, depth in ((1, 3), (2, 6)):
        first, second, joined = (load(tmp_path / f"{count}-rank{rank}-stage{stage}.pt") for rank, count in places)
        assert_equal(first["weights"], second["weights"])
        assert_equal(first["gradient"], second["gradient"])
        assert_close(first["gradient"], joined["gradient"], f"stage {stage}")
        layers = {name.split(".")[2] for name in joined["gradient"] if name.startswith("encoder.layers")}
        assert len(layers) == depth


# An end for one is an end for all, and the job goes on


def test_a_killed_process_ends_the_job_which_goes_on_afterwards_to_the_same_weights(job, finished, tmp_path):
    # A data worker outlives its killed process for some seconds and holds the connection to the other process.
    fields = {**EVERY_UPDATE, "dataset.num_workers": 1}
    assert job(fields, {1: partial(signal_before, 5, signal.SIGKILL)}) == [1, -signal.SIGKILL], log(tmp_path)
    assert job(fields) == [0, 0], log(tmp_path)
    assert re.search(r"Loaded checkpoint \S+ \(epoch 2 @ 5 updates\)", log(tmp_path))
    assert same_state(tmp_path, finished)


def test_torchrun_starts_a_killed_process_again_and_the_job_ends_with_the_same_weights(
    server, finished, speech, teacher_file, tmp_path
):
    overrides = tiny(speech, teacher_file, tmp_path, **FIELDS, **EVERY_UPDATE)
    job = start_under_torchrun(
        server, "librispeech_base", overrides, tmp_path, partial(kill_one_of_torchruns_before, 5)
    )
    output = tmp_path / "log"
    assert wait([job]) == [0], output.read_text()
    assert re.search(r"Loaded checkpoint \S+ \(epoch 2 @ 5 updates\)", output.read_text())
    assert same_state(tmp_path, finished)


def test_torchrun_passes_a_sigterm_on_and_the_same_command_goes_on_to_the_same_weights(
    server, finished, speech, teacher_file, tmp_path
):
    start = partial(
        start_under_torchrun, server, "librispeech_base", tiny(speech, teacher_file, tmp_path, **FIELDS), tmp_path
    )
    output = tmp_path / "log"
    assert wait([start(partial(end_torchrun_before, 6))]) != [0]
    assert "SIGTERM ends the run at update 7; the same command resumes it" in output.read_text()
    assert wait([start()]) == [0], output.read_text()
    assert same_state(tmp_path, finished)


@pytest.mark.parametrize("told", [{1: 6}, {0: 8, 1: 6}], ids=["one process", "both, at different updates"])
def test_a_job_that_is_told_to_end_saves_one_checkpoint_and_goes_on_afterwards_to_the_same_weights(
    job, finished, tmp_path, told
):
    misfortunes = {rank: partial(signal_before, update, signal.SIGTERM) for rank, update in told.items()}
    assert job({}, misfortunes) == [143, 143], log(tmp_path)
    assert "Traceback" not in log(tmp_path) + log(tmp_path, 1)
    assert "SIGTERM ends the run at update 7; the same command resumes it" in log(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["checkpoint_last.pt"]
    assert load(tmp_path / "checkpoints/checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 7
    assert job({}) == [0, 0], log(tmp_path)
    assert same_state(tmp_path, finished)


def test_no_process_ends_before_the_checkpoint_is_written(server, speech, teacher_file, tmp_path):
    overrides = tiny(speech, teacher_file, tmp_path, **FIELDS)
    first, second = start_job(server, "librispeech_base", overrides, tmp_path, {0: partial(save_late, 1.0, 2)})
    assert wait([second]) == [143], log(tmp_path, 1)
    assert (tmp_path / "checkpoints/checkpoint_last.pt").exists()
    assert wait([first]) == [143], log(tmp_path)


def test_a_loss_that_is_not_finite_in_one_process_ends_the_job_with_its_line(job, tmp_path):
    assert job(EVERY_UPDATE, {1: partial(damage_before, 5)}) == [1, 1]
    assert re.search(r"^error: at update 5, stage 3, the loss \(nan\) is not finite on the utt", log(tmp_path, 1), re.M)
    last = load(tmp_path / "checkpoints/checkpoint_last.pt")
    assert last["optimizer_history"][-1]["num_updates"] == 5
    assert all(value.isfinite().all() for value in last["model"].values())


def test_bad_input_of_one_process_ends_the_job_with_its_line(job, speech, tmp_path):
    data = shutil.copytree(speech, tmp_path / "speech")
    manifest = (data / "train.tsv").read_text().replace(str(speech), str(data))
    (data / "train.tsv").write_text(manifest)
    broken = data / manifest.splitlines()[1].split("\t")[0]
    broken.write_bytes(b"fLaC but not really")
    assert job({}, data=data) == [1, 1]
    assert f"error: {broken}" in log(tmp_path) + log(tmp_path, 1)


def test_no_process_loads_a_checkpoint_before_the_newest_whole_one_is_in_its_place(job, finished, tmp_path):
    assert job(EVERY_UPDATE, {0: partial(signal_before, 6, signal.SIGTERM)}) == [143, 143], log(tmp_path)
    last = tmp_path / "checkpoints/checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    assert job(EVERY_UPDATE, {0: partial(recover_late, 1.0)}) == [0, 0], log(tmp_path, 1)
    assert "checkpoint_last.pt.broken" in log(tmp_path)
    assert same_state(tmp_path, finished)
