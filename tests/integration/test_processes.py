"""Two processes train as one: on a CPU with gloo, through fairseq's own command."""

import re
import shutil
import signal

import pytest
import torch
from processes import free_port, gradients_by_torch, record, start, start_job, wait
from training import tiny, train

UPDATES, GROWTHS = 14, [1, 4, 8]  # PROP-1
# Without dropout, as one process draws other numbers for its second batch than a second process for its first.
FIELDS = {
    "optimization.max_update": UPDATES,
    "checkpoint.save_interval_updates": 1,
    "dataset.disable_validation": True,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
}


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
        assert_close(two, one, f"update {update}")
        # Of the layers that no stage has reached, legacy_ddp makes gradients of zero.
        assert not any(two[name].any() for name in two.keys() - one.keys())


def test_a_killed_process_ends_the_job_which_goes_on_afterwards_to_the_same_weights(
    finished, speech, teacher_file, tmp_path
):
    # A data worker outlives its killed process for some seconds and holds the connection to the other process.
    overrides = tiny(speech, teacher_file, tmp_path, **FIELDS, **{"dataset.num_workers": 1})
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


def test_under_torchs_ddp_the_gradient_of_two_processes_is_that_of_one_on_the_joined_batch(
    speech, teacher_file, tmp_path
):
    job, port = tiny(speech, teacher_file, tmp_path, **FIELDS), free_port()
    processes = [(0, 2), (1, 2), (0, 1)]
    codes = wait([start(gradients_by_torch, *process, port, job, tmp_path) for process in processes])
    assert codes == [0, 0, 0]
    for stage, depth in ((1, 3), (2, 6)):
        first, second, joined = (
            load(tmp_path / f"{count}-rank{rank}-stage{stage}.pt") for rank, count in processes
        )
        assert_equal(first, second)
        # DDP gives the mean over processes; fairseq multiplies by their number and divides by all frames.
        assert_close({name: 2 * value for name, value in first.items()}, joined, f"stage {stage}")
        assert len({name.split(".")[2] for name in joined if name.startswith("encoder.layers")}) == depth
