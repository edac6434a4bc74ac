"""Two processes train as one: on a CPU with gloo, through fairseq's own command."""

import re
import shutil
import signal

import pytest
import torch
from processes import record, start_job, wait
from training import tiny, train

UPDATES, GROWTHS = 14, [1, 4, 8]  # PROP-1
# Without dropout, as one process draws other numbers for its second batch than a second process for its first.
FIELDS = {
    "optimization.max_update": UPDATES,
    "checkpoint.save_interval_updates": 1,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
}


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def finished(speech, teacher_file, tmp_path_factory):
    """An uninterrupted job of two processes."""
    folder = tmp_path_factory.mktemp("two")
    codes = wait(start_job("librispeech_base", tiny(speech, teacher_file, folder, **FIELDS), folder))
    assert codes == [0, 0], (folder / "rank0.log").read_text()[-3000:]
    return folder


def test_all_processes_hold_the_same_weights_after_each_growth_and_the_same_gradients(finished):
    for update in GROWTHS:
        assert_equal(*(load(finished / f"rank{rank}-grown{update}.pt") for rank in (0, 1)))
    for update in range(UPDATES):
        assert_equal(*(load(finished / f"rank{rank}-gradient{update}.pt") for rank in (0, 1)))


def test_the_gradient_of_two_processes_is_that_of_accumulation_in_one(
    finished, speech, teacher_file, tmp_path, monkeypatch
):
    record(tmp_path, 0, monkeypatch.setattr)
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **FIELDS, **{"optimization.update_freq": "[2]"}))
    for update in range(UPDATES):
        one, two = (load(folder / f"rank0-gradient{update}.pt") for folder in (tmp_path, finished))
        size = max(value.abs().max() for value in one.values())
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4 * size, msg=f"{name}, update {update}")
        # Of the layers that no stage has reached, legacy_ddp makes gradients of zero.
        assert not any(two[name].any() for name in two.keys() - one.keys())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_process_ends_the_job_which_goes_on_afterwards_to_the_same_weights(
    workers, finished, speech, teacher_file, tmp_path
):
    overrides = tiny(speech, teacher_file, tmp_path, **FIELDS, **{"dataset.num_workers": workers})
    codes = wait(start_job("librispeech_base", overrides, tmp_path, kill_at=5))
    assert codes == [1, -signal.SIGKILL], (tmp_path / "rank0.log").read_text()[-3000:]
    codes = wait(start_job("librispeech_base", overrides, tmp_path))
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
    assert re.search(r"Loaded checkpoint \S+ \(epoch 2 @ 5 updates\)", (tmp_path / "rank0.log").read_text())
    ours, theirs = (load(folder / "checkpoints/checkpoint_last.pt") for folder in (tmp_path, finished))
    assert_equal(ours["model"], theirs["model"])


def test_bad_input_of_one_process_ends_the_job_with_its_line(speech, teacher_file, tmp_path):
    data = shutil.copytree(speech, tmp_path / "speech")
    manifest = (data / "train.tsv").read_text().replace(str(speech), str(data))
    (data / "train.tsv").write_text(manifest)
    broken = data / manifest.splitlines()[1].split("\t")[0]
    broken.write_bytes(b"fLaC but not really")
    codes = wait(start_job("librispeech_base", tiny(data, teacher_file, tmp_path, **FIELDS), tmp_path))
    assert codes == [1, 1]
    assert f"error: {broken}" in "".join((tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1))
