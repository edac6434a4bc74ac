"""The report from real event files and a tiny HubertModel whose weights are random."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.analysis.hidden_states import hidden_states_of
from fairseq_stack.analysis.report import write_report
from fairseq_stack.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """100 updates: 2 layers and 0.25 s per update up to update 40, then 4 layers and 0.5 s.

    A log entry every 5 updates, a validation of 3 s every 20, stopped at update 75 and resumed
    from update 60 an hour later.
    """
    folder = tmp_path_factory.mktemp("training")
    log(folder, first=1, last=75, clock=1000.0)
    log(folder, first=61, last=100, clock=4600.0)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(
        "model:\n  stack_method: interleaved\n  stack_stages: 2\n  note: <b>&\n"
    )
    return folder


def log(folder, first, last, clock):
    with SummaryWriter(folder / "tensorboard" / "train_inner") as train, SummaryWriter(
        folder / "tensorboard" / "valid"
    ) as valid:
        for update in range(first, last + 1):
            deep = update > 40
            clock += 0.5 if deep else 0.25
            losses = {"loss": 3 / update, "output_loss": 2 / update, "intermediate_loss": 2 / update}
            if update % 5 == 0:
                for name, value in {**losses, "stage": 1 + deep, "depth": 4 if deep else 2}.items():
                    train.add_scalar(name, value, update, walltime=clock)
            if update % 20 == 0:
                clock += 3
                for name, value in losses.items():
                    valid.add_scalar(name, value, update, walltime=clock)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture
def speech(tmp_path):
    """Three seconds of noise in three files, and their manifest."""
    rng = np.random.default_rng(0)
    names = ["a.wav", "b.wav", "c.wav"]
    for name in names:
        soundfile.write(tmp_path / name, rng.normal(scale=0.1, size=16_000), 16_000)
    manifest = tmp_path / "valid.tsv"
    manifest.write_text("\n".join([str(tmp_path), *(f"{name}\t16000" for name in names)]) + "\n")
    return manifest


def assert_is_image(png):
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")
    assert min(pixels.shape[:2]) > 500
    assert pixels[..., :3].std() > 0.01  # more than an empty canvas


def test_the_script_writes_the_whole_report_without_fairseq_and_hydra(run, student, speech, tmp_path):
    report = tmp_path / "new" / "report"
    arguments = ["report.py", run, "--output", report, "--student", student, "--speech", speech]
    without = "import runpy, sys; sys.modules.update(fairseq=None, hydra=None); sys.argv = sys.argv[1:]; "
    script = without + f"runpy.run_path({str(ROOT / 'scripts' / 'report.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr

    # Stage 1 trains 40 updates at 0.25 s and stage 2 sixty at 0.5 s, whatever pauses lie between.
    lines = [line for line in done.stdout.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[2:] == [
        ["1", "2", "40", "10.0", "0.250", "0.50", "0.1500", "0.0750"],
        ["2", "4", "60", "30.0", "0.500", "1.00", "0.0500", "0.0300"],
    ]
    assert (report / "stages.md").read_text() in done.stdout
    names = sorted(path.name for path in report.iterdir())
    assert names == ["index.html", "loss.png", "similarity.png", "stages.md"]

    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|<script|@import|url\(|file:", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert embedded == [(report / name).read_bytes() for name in ("loss.png", "similarity.png")]
    for png in embedded:
        assert_is_image(png)
    assert "<td>30.0</td>" in page
    assert "1.25×" in page  # 100 updates of 0.5 s against 40 s
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page


def test_without_hidden_states_the_report_has_the_losses_and_the_stages(run, tmp_path):
    table = write_report(run, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "loss.png", "stages.md"]
    assert table == (tmp_path / "stages.md").read_text()


def test_a_training_without_stages_is_refused_and_nothing_is_written(tmp_path):
    with SummaryWriter(tmp_path / "tensorboard" / "train_inner") as writer:
        writer.add_scalar("loss", 1.0, 10)
    with pytest.raises(InputError, match="no scalar 'stage'"):
        write_report(tmp_path, tmp_path / "report")
    with pytest.raises(InputError, match="no TensorBoard event files"):
        write_report(tmp_path / "elsewhere", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_hidden_states_run_from_the_input_of_the_first_layer_to_the_output_of_the_last(student, speech):
    states = hidden_states_of(student, speech, seconds=60)
    assert [state.shape for state in states] == [(3 * 49, 16)] * 5  # 16,000 samples make 49 frames
    model = HubertModel.from_pretrained(student).eval()
    with torch.no_grad():
        one = []
        for name in "abc":
            wave, _ = soundfile.read(speech.parent / f"{name}.wav")
            wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)  # do_normalize
            one.append(model(torch.tensor(wave[None], dtype=torch.float32)).last_hidden_state[0].numpy())
    # The utterances come in a drawn order, so the frames are compared as sets.
    def ordered(frames):
        return frames[np.argsort(frames[:, 0])]

    np.testing.assert_allclose(ordered(states[-1]), ordered(np.concatenate(one)), atol=1e-5)


def test_speech_is_drawn_up_to_the_given_seconds_and_the_same_each_time(student, speech):
    states = hidden_states_of(student, speech, seconds=2.5)
    assert len(states[0]) == 2 * 49
    np.testing.assert_array_equal(states[-1], hidden_states_of(student, speech, seconds=2.5)[-1])


def test_unusable_students_and_speech_are_named(student, speech, tmp_path):
    with pytest.raises(InputError, match="nowhere has no config.json"):
        hidden_states_of(tmp_path / "nowhere", speech)
    with pytest.raises(InputError, match="missing.tsv: cannot read this manifest"):
        hidden_states_of(student, tmp_path / "missing.tsv")
    (tmp_path / "empty.tsv").write_text(f"{tmp_path}\n")
    with pytest.raises(InputError, match="empty.tsv: lists no files"):
        hidden_states_of(student, tmp_path / "empty.tsv")
    for samples, rate, complaint in (
        (np.zeros(16_000), 8_000, "8000 Hz"),
        (np.zeros((16_000, 2)), 16_000, "2 channel"),
        (np.zeros(399), 16_000, "399 samples"),
    ):
        soundfile.write(tmp_path / "odd.wav", samples, rate)
        (tmp_path / "odd.tsv").write_text(f"{tmp_path}\nodd.wav\t{len(samples)}\n")
        with pytest.raises(InputError, match=rf"odd\.wav.*{complaint}"):
            hidden_states_of(student, tmp_path / "odd.tsv")
    (tmp_path / "odd.wav").write_bytes(b"no audio")
    with pytest.raises(InputError, match="odd.wav: cannot be read"):
        hidden_states_of(student, tmp_path / "odd.tsv")


def test_a_student_with_broken_weights_is_refused(student, speech, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((student / name).read_bytes())
    with pytest.raises(InputError, match="cannot be loaded as a HubertModel"):
        hidden_states_of(tmp_path, speech)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be loaded as a HubertModel"):
        hidden_states_of(tmp_path, speech)
