"""The demo's teacher is a real fairseq HuBERT checkpoint, made once, and resumed when it was interrupted."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from fairseq.models.hubert import HubertModel
from omegaconf import OmegaConf

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo_teacher" / "make_demo_teacher.py"
SIZES = [
    "model.encoder_layers=2",
    "model.encoder_embed_dim=32",
    "model.encoder_ffn_embed_dim=64",
    "model.encoder_attention_heads=2",
    "model.conv_feature_layers='[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2'",
    "common.log_interval=1",
]


def make_teacher(speech, output, *overrides):
    command = [sys.executable, SCRIPT, "--speech", speech, "--output", output, *overrides]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more only get in each other's way at these sizes
    return subprocess.run(command, capture_output=True, text=True, env=one_thread)


def make_teacher_here(monkeypatch, speech, output):
    """Run the script in this process, which has its imports already; for runs that train nothing."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--speech", str(speech), "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def write_speech(folder):
    """Write buzzes of changing pitch and timbre, 2 s each, and their manifests."""
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for split, utterances in (("train", 6), ("valid", 2)):
        rows = [str(folder)]
        for number in range(utterances):
            pitch = np.repeat(rng.uniform(80, 300, 20), 1600)  # Hz, a new one every 0.1 s
            phase = 2 * np.pi * np.cumsum(pitch) / 16000
            harmonics = [np.repeat(rng.uniform(0, 0.1, 20), 1600) * np.sin(k * phase) for k in range(1, 11)]
            name = f"audio/{split}{number}.wav"
            soundfile.write(folder / name, sum(harmonics), 16000)
            rows.append(f"{name}\t{len(phase)}")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder)
    return folder


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    output = tmp_path_factory.mktemp("a teacher's home")
    run = make_teacher(speech, output, *SIZES, "optimization.max_update=4")
    assert run.returncode == 0, run.stderr
    return output


def test_the_result_is_a_hubert_checkpoint_that_fairseq_loads_strictly(trained):
    state = torch.load(trained / "teacher.pt", weights_only=False)  # as fairseq pickles its dictionary
    task = tasks.setup_task(OmegaConf.create(state["cfg"]["task"]))
    task.load_state_dict(state["task_state"])
    model = task.build_model(OmegaConf.create(state["cfg"]["model"]))
    assert isinstance(model, HubertModel)
    model.load_state_dict(state["model"], strict=True)
    assert len(model.encoder.layers) == 2
    assert state["optimizer_history"][-1]["num_updates"] == 4


def test_labels_have_100_frames_per_second_and_numbers_of_the_dictionary(trained):
    dictionary = Dictionary.load(str(trained / "labels" / "dict.km.txt"))
    for split, utterances in (("train", 6), ("valid", 2)):
        rows = (trained / "labels" / f"{split}.km").read_text().splitlines()
        # Windows of 400 samples every 160, whole ones only: 1 + (32000 - 400) // 160.
        assert [len(row.split()) for row in rows] == [198] * utterances
        assert all(dictionary.index(label) != dictionary.unk() for row in rows for label in row.split())


def test_a_second_run_keeps_the_teacher(speech, trained, monkeypatch, capsys):
    before = (trained / "teacher.pt").stat()
    make_teacher_here(monkeypatch, speech, trained)
    assert "already there, kept" in capsys.readouterr().out
    after = (trained / "teacher.pt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_interrupted_training_goes_on_from_its_last_checkpoint(speech, trained, tmp_path):
    for kept in ("labels", "checkpoints"):
        (tmp_path / kept).symlink_to(trained / kept)
    run = make_teacher(speech, tmp_path, *SIZES, "optimization.max_update=6")
    assert run.returncode == 0, run.stderr
    assert "num_updates=5," in run.stdout
    assert "num_updates=1," not in run.stdout
    assert (tmp_path / "teacher.pt").exists()


def test_labels_of_other_speech_are_refused_not_trained_on(speech, trained, tmp_path, monkeypatch):
    (tmp_path / "labels").symlink_to(trained / "labels")
    other = tmp_path / "other speech"
    other.mkdir()
    for split in ("train", "valid"):
        rows = (speech / f"{split}.tsv").read_text().splitlines()
        (other / f"{split}.tsv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/labels: belongs to another train\.tsv .*$"):
        make_teacher_here(monkeypatch, other, tmp_path)
    assert not (tmp_path / "teacher.pt").exists()


def test_a_folder_without_manifests_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/train\.tsv: .*fairseq-stack prepare first$"):
        make_teacher_here(monkeypatch, tmp_path, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_audio_at_another_rate_is_refused_and_leaves_no_labels(speech, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "telephone.wav", np.zeros(8000), 8000)
    for split in ("train", "valid"):
        (tmp_path / f"{split}.tsv").write_text(f"{tmp_path}\ntelephone.wav\t8000\n")
    with pytest.raises(SystemExit, match=r"^error: .*telephone\.wav: has 8000 Hz"):
        make_teacher_here(monkeypatch, tmp_path, tmp_path / "output")
    assert not (tmp_path / "output" / "labels" / "dict.km.txt").exists()
