"""The teacher's targets are computed once: stored ones train as live ones do, and no other is ever used."""

import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile
import torch
from fork_server import ForkServer
from training import command, stored_entries, tiny, train

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.targets.shards import ROW
from fairseq_stack.teachers.fairseq_checkpoint import FairseqTeacher

SHARED_CNN = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0.0}
# The windows of longer recordings, dropout and growth all take part.
WINDOWS = {"task.max_sample_size": 4000}
CODES = {"+task.target_format": "pq8"}


@pytest.fixture
def heard(monkeypatch):
    """The batches that teachers have heard."""
    batches = []
    hidden_states = FairseqTeacher.hidden_states

    def watched(teacher, waveforms, *args):
        batches.append(waveforms)
        return hidden_states(teacher, waveforms, *args)

    monkeypatch.setattr(FairseqTeacher, "hidden_states", watched)
    return batches


@pytest.fixture(scope="module")
def fork_server():
    with ForkServer() as server:
        yield server


def run(speech, teacher_file, folder, store=None, **fields):
    if store:
        fields["+task.target_store"] = store
    return train("librispeech_base", tiny(speech, teacher_file, folder, **WINDOWS, **fields))


def weights(trainer):
    return {name: value.clone() for name, value in trainer.get_model().state_dict().items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def losses(folder):
    return read_scalars(folder / "tensorboard/train_inner")["loss"].values


@pytest.fixture(scope="module")
def filled(speech, teacher_file, tmp_path_factory):
    """The folder of a run of 20 updates that has filled a store there, and the weights that it ended with."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, weights(run(speech, teacher_file, folder, folder / "store"))


@pytest.fixture
def store(filled, tmp_path):
    shutil.copytree(filled[0] / "store", tmp_path / "store")
    return tmp_path / "store"


def close(ours, theirs):
    """Whether weights differ by no more than what a last bit of fp16 in a few targets makes of them."""
    return all(torch.allclose(value, theirs[name], atol=1e-4) for name, value in ours.items())


def test_stored_targets_train_as_live_ones_do_and_the_teacher_is_not_loaded_again(
    speech, teacher_file, tmp_path, filled, store, heard
):
    second = run(speech, teacher_file, tmp_path / "second", store)
    assert not heard and "loaded" not in vars(second.task.teacher)
    assert same(weights(second), filled[1])
    run(speech, teacher_file, tmp_path / "live")
    live, stored = losses(tmp_path / "live"), losses(filled[0])
    assert len(heard) > 20 and len(live) == 20 and abs(live - stored).max() < 2e-3 * live.min()


def test_with_a_shared_cnn_its_features_are_stored_too_and_audio_is_not_even_read(
    speech, teacher_file, tmp_path, heard, monkeypatch
):
    first = run(speech, teacher_file, tmp_path / "first", tmp_path / "store", **SHARED_CNN)
    run(speech, teacher_file, tmp_path / "live", **SHARED_CNN)
    live, stored = losses(tmp_path / "live"), losses(tmp_path / "first")
    assert len(heard) > 20 and abs(live - stored).max() < 2e-3 * live.min()
    heard.clear()
    monkeypatch.setattr("fairseq_stack.data.dataset.read_audio", None)
    second = run(speech, teacher_file, tmp_path / "second", tmp_path / "store", **SHARED_CNN)
    assert not heard and same(weights(first), weights(second))


def warnings(caplog):
    return [line for line in caplog.messages if "computed again" in line]


def test_int8_trains_within_its_measured_error(speech, teacher_file, tmp_path, filled):
    run(speech, teacher_file, tmp_path, tmp_path / "store", **{"+task.target_format": "int8"})
    half, byte = losses(filled[0]), losses(tmp_path)
    assert 0 < abs(half - byte).max() < 0.01 * half.min()


def test_codes_train_within_what_they_keep_and_are_all_that_the_next_run_needs(
    speech, teacher_file, tmp_path, filled, heard, caplog
):
    caplog.set_level("INFO")
    first = run(speech, teacher_file, tmp_path / "first", tmp_path / "store", **CODES)
    (line,) = [line for line in caplog.messages if "pq8 keeps" in line]
    kept = [float(share) for share in re.findall(r"(0\.\d+) \(\d+\)", line)]
    assert len(kept) == 3 and min(kept) > 0.9
    half, codes = losses(filled[0]), losses(tmp_path / "first")
    assert 0 < abs(half - codes).max() < 0.1 * half.min()
    heard.clear()
    second = run(speech, teacher_file, tmp_path / "second", tmp_path / "store", **CODES)
    assert not heard and same(weights(first), weights(second))


def test_damaged_entries_are_computed_again_and_said(speech, teacher_file, tmp_path, filled, store, heard, caplog):
    (tar,), (index,) = store.glob("*/*/*.tar"), store.glob("*/*/*.index")
    rows = np.fromfile(index, ROW)
    content = bytearray(tar.read_bytes())
    content[int(rows["offset"][3]) + 512 + 1000] ^= 1
    content[rows["offset"][4] : rows["offset"][5]] = bytes(rows["offset"][5] - rows["offset"][4])
    tar.write_bytes(content)
    again = run(speech, teacher_file, tmp_path / "run", store)
    assert 1 <= len(heard) <= 2 and close(weights(again), filled[1])
    lines = warnings(caplog)
    names = [row["name"].hex() for row in rows[3:5]]
    assert len(lines) == 2 and all(any(f"{name}.npz in {tar}" in line for line in lines) for name in names)
    assert stored_entries(store) == len(rows) + 2


def test_other_audio_under_the_same_name_is_noticed(speech, teacher_file, tmp_path, store, heard, caplog):
    moved = move(speech, tmp_path / "speech")
    samples, rate = soundfile.read(moved / "audio/train5.flac")
    soundfile.write(moved / "audio/train5.flac", samples[::-1], rate)
    changed = run(moved, teacher_file, tmp_path / "changed", store)
    assert heard and warnings(caplog)
    assert all("is about other audio (audio/train5.flac)" in line for line in warnings(caplog))
    fresh = run(moved, teacher_file, tmp_path / "fresh", tmp_path / "another store")
    assert close(weights(changed), weights(fresh))


def move(speech, folder):
    """Speech and its manifests in another place."""
    shutil.copytree(speech, folder)
    for split in ("train", "valid"):
        text = (speech / f"{split}.tsv").read_text()
        (folder / f"{split}.tsv").write_text(text.replace(str(speech), str(folder)))
    return folder


def test_another_teacher_does_not_find_the_targets_of_the_first(speech, teacher_file, tmp_path, store, heard):
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["encoder.layers.11.fc2.weight"] *= 1 + 1e-6
    torch.save(state, tmp_path / "teacher.pt")
    run(speech, tmp_path / "teacher.pt", tmp_path / "run", store)
    assert heard and len(list(store.iterdir())) == 2


@pytest.mark.parametrize("options", [{}, SHARED_CNN, CODES], ids=["own CNN", "shared CNN", "codes"])
def test_a_run_killed_while_it_fills_the_store_ends_as_the_uninterrupted_one(
    speech, teacher_file, tmp_path, fork_server, options
):
    def start(folder, kill_at=None, count=stored_entries):
        """Kill the run as soon as the store holds so many entries or codebooks; returns its exit code."""
        fields = {"checkpoint.save_interval_updates": 3, "+task.target_store": folder / "store"}
        overrides = tiny(speech, teacher_file, folder, **WINDOWS, **fields, **options)
        pid = fork_server.start("librispeech_base", overrides, tmp_path / f"{folder.name}.log")
        while kill_at and count(folder) < kill_at:
            time.sleep(0.001)
        if kill_at:
            os.kill(pid, signal.SIGKILL)
        return fork_server.wait()

    def codebooks(folder):
        return len(list(folder.glob("store/*/codebooks/*.safetensors")))

    def ending(folder):
        return torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=True)["model"]

    assert start(tmp_path / "whole") == 0
    if options is CODES:  # of the codebooks of three layers
        assert start(tmp_path / "killed", kill_at=1, count=codebooks) == -signal.SIGKILL
    else:  # of 24 entries: before the first checkpoint, and behind it
        assert start(tmp_path / "killed", kill_at=5) == -signal.SIGKILL
    assert start(tmp_path / "killed", kill_at=15) == -signal.SIGKILL
    assert start(tmp_path / "killed") == 0
    assert same(ending(tmp_path / "whole"), ending(tmp_path / "killed"))


def test_a_store_filled_ahead_by_two_processes_and_by_steps_is_all_that_a_training_needs(
    speech, teacher_file, tmp_path, heard
):
    fields = {"+task.target_store": tmp_path / "store", "dataset.num_workers": 1, **CODES}
    arguments = ["--config-name", "librispeech_base"]
    arguments += tiny(speech, teacher_file, tmp_path, **WINDOWS, **fields)
    script = command("python", "-m", "fairseq_stack", "store-targets", "--processes", 2, *arguments)
    output, _ = script.communicate()
    assert script.returncode == 0, output
    assert output.count("share of the variance that pq8 keeps") == 1
    samples = [int(line.split("\t")[1]) for line in (speech / "train.tsv").read_text().splitlines()[1:]]
    windows = sum(-(-each // WINDOWS["task.max_sample_size"]) for each in samples) + 6
    assert stored_entries(tmp_path) == windows
    moved = move(speech, tmp_path / "moved")
    run(moved, teacher_file, tmp_path / "run", tmp_path / "store", **CODES)
    assert not heard


def test_a_store_that_cannot_be_is_refused_in_one_line(speech, teacher_file, tmp_path):
    (tmp_path / "file").touch()
    huge = tmp_path / "huge"
    huge.mkdir()
    for split in ("train", "valid"):
        lines = (speech / f"{split}.tsv").read_text().splitlines()
        (huge / f"{split}.tsv").write_text("\n".join([*lines[:-1], lines[-1] + "0" * 9]) + "\n")
    for data, store, fields, message in (
        (speech, "file", {}, "file cannot be written (Not a directory)"),
        (speech, "store", {"+task.target_format": "fp8"}, "task.target_format=fp8 is unknown"),
        (speech, "store", {"+task.target_format": "units600"}, "units600 learns 600 entries, but train has only"),
        (huge, "store", {"task.max_sample_size": 10**15}, "TB more for"),
    ):
        fields["+task.target_store"] = tmp_path / store
        with pytest.raises(SystemExit) as ended:
            train("librispeech_base", tiny(data, teacher_file, tmp_path / "run", **fields))
        assert ended.value.code.startswith("error: task.target_") and message in ended.value.code
        assert "\n" not in ended.value.code
