"""The report from real event files and a tiny HubertModel whose weights are random."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.analysis.hidden_states import hidden_states_of
from fairseq_stack.analysis.objective import kinds_of
from fairseq_stack.analysis.plots import (
    draw_growths,
    draw_layer_weights,
    draw_losses,
    draw_similarity,
    lowest_similarity,
)
from fairseq_stack.analysis.probes import read_layer_weights
from fairseq_stack.analysis.report import write_report
from fairseq_stack.analysis.runs import read_run, read_runs
from fairseq_stack.errors import InputError
from fairseq_stack.growth.growth_similarity import GrowthSimilarity, write_growth

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
    begin = clock
    with (
        SummaryWriter(folder / "tensorboard" / "train_inner") as train,
        SummaryWriter(folder / "tensorboard" / "valid") as valid,
    ):
        for update in range(first, last + 1):
            deep = update > 40
            clock += 0.5 if deep else 0.25
            losses = {"loss": 3 / update, "output_loss": 2 / update, "intermediate_loss": 2 / update}
            if update % 5 == 0:
                wall = round(clock - begin)  # as fairseq rounds it
                for name, value in {**losses, "stage": 1 + deep, "depth": 4 if deep else 2, "wall": wall}.items():
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
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
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
    arguments = ["report", run, "--output", report, "--student", student, "--speech", speech]
    script = "import sys; sys.modules.update(fairseq=None, hydra=None); from fairseq_stack.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    assert names == ["index.html", "loss.png", "loss_by_time.png", "similarity.png", "stages.md"]

    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|<script|@import|url\(|file:", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert embedded == [(report / name).read_bytes() for name in ("loss.png", "loss_by_time.png", "similarity.png")]
    for png in embedded:
        assert_is_image(png)
    assert "<td>30.0</td>" in page
    assert "1.25×" in page  # 100 updates of 0.5 s against 40 s
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page


def test_wall_clock_time_leaves_out_pauses_and_what_a_resumed_run_did_again(run):
    read = read_run(run, "run")
    hours = read.hours(read.train["loss"])
    # Updates 1 to 60 of the first start: 40 x 0.25 s, 20 x 0.5 s and two validations of 3 s (the third comes behind
    # the entry at 60). From there on the second start's clock counts: 40 x 0.5 s and a validation behind 80.
    at = dict(zip(read.train["loss"].updates.tolist(), (3600 * hours).tolist()))
    assert at[40] == pytest.approx(10 + 3, abs=0.5) and at[60] == pytest.approx(10 + 10 + 6, abs=0.5)
    assert at[65] == pytest.approx(at[60] + 2.5, abs=1) and at[100] == pytest.approx(at[60] + 20 + 3, abs=1)
    assert (np.diff(hours) > 0).all()
    validations = 3600 * read.hours(read.valid["loss"])
    assert validations[1] == pytest.approx(at[40] + 3, abs=0.5) and validations[4] == pytest.approx(
        at[100] + 3, abs=0.5
    )


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """100 updates at full depth and 0.5 s, without validation."""
    folder = tmp_path_factory.mktemp("slow")
    with SummaryWriter(folder / "tensorboard" / "train_inner") as train:
        for update in range(5, 101, 5):
            entry = {"loss": 2 / update, "stage": 1, "depth": 4, "wall": round(0.5 * update)}
            for name, value in entry.items():
                train.add_scalar(name, value, update, walltime=1000 + 0.5 * update)
    return folder


def test_several_runs_share_the_plots_and_are_compared_with_a_reference(run, slow_run, tmp_path):
    write_growth(tmp_path / "run" / "checkpoints", GrowthSimilarity(40, np.eye(3), np.eye(5)))
    (tmp_path / "run" / "tensorboard").symlink_to(run / "tensorboard")
    runs, reference = read_runs([tmp_path / "run", slow_run], slow_run)
    assert [one.name for one in runs] == ["run", slow_run.name] and reference is runs[1]
    tables = write_report(runs, tmp_path / "report", reference)
    assert tables.count("| stage |") == 2 and f"\n{slow_run.name}\n" in tables
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    # 0.5 s an update against 40 of 0.25 s and 60 of 0.5 s; the reference's own cell is empty.
    assert f"<td>speed-up over {slow_run.name}</td><td>1.25×</td><td>–</td>" in page
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert pictures == ["growths_1.png", "loss.png", "loss_by_time.png"]
    for name in pictures:
        assert_is_image((tmp_path / "report" / name).read_bytes())


def with_config(run, folder, criterion):
    """A run's scalars beside another configuration."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / "tensorboard").symlink_to(run / "tensorboard")
    config = {
        "task": {"data": "speech", "teacher": "teacher.pt"},
        "criterion": criterion,
        "model": {"stack_method": "none"},
    }
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))
    return folder


def test_runs_with_different_losses_have_rows_and_axes_of_their_own(run, tmp_path):
    criteria = {"alike_1": {}, "other": {"intermediate_weight": 0.1}, "alike_2": {"loss": "mse"}}
    runs, _ = read_runs([with_config(run, tmp_path / name, criterion) for name, criterion in criteria.items()])
    text = write_report(runs, tmp_path / "report")
    sentence = (
        "These runs have 2 different losses, which cannot be compared with each other: A is alike_1, alike_2"
        " (criterion.intermediate_weight=0.5); B is other (criterion.intermediate_weight=0.1)."
    )
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert text.splitlines()[-1] == sentence and sentence in page.replace("<wbr>", "")
    assert "<td>last validation loss A</td><td>0.0300</td><td>–</td><td>0.0300</td>" in page
    assert "<td>last validation loss B</td><td>–</td><td>0.0300</td><td>–</td>" in page
    # The loss of the last layer is the same for all.
    assert "layer alone</td><td>0.0200</td><td>0.0200</td><td>0.0200</td>" in page
    figure = draw_losses(runs, "updates", kinds_of([one.objective for one in runs]))
    shown = [{text.get_text() for text in axis.get_legend().get_texts()} for axis in figure.axes]
    assert shown == [{"alike_1", "alike_2"}, {"other"}]

    # An update that holds less speech is no faster update.
    assert "an update holds" not in text
    config = {**runs[0].config, "dataset": {"batch_size": 8}, "optimization": {"update_freq": [1]}}
    smaller = replace(runs[2], config={**config, "dataset": {"batch_size": 2}})
    text = write_report([smaller], tmp_path / "report", replace(runs[0], config=config))
    assert text.splitlines()[-1] == (
        "alike_2: updates differ in their speech from those of alike_1 (dataset.batch_size=2 and not 8), so the speed-up over"
        " alike_1 compares different work."
    )

    # Without a configuration nothing tells.
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensorboard").symlink_to(run / "tensorboard")
    text = write_report(read_runs([tmp_path / "c", tmp_path / "d"])[0], tmp_path / "report")
    assert "whether their losses can be compared is unknown" in text.splitlines()[-1]
    text = write_report([runs[0], runs[2]], tmp_path / "report")
    assert text.splitlines()[-1].startswith("|")


def test_times_that_other_work_has_turned_around_are_flagged(tmp_path):
    with SummaryWriter(tmp_path / "slowed" / "tensorboard" / "train_inner") as train:
        for update in range(1, 41):
            clock = 1000 + (3 * update if update <= 20 else 60 + (update - 20))
            deep = update > 20
            for name, value in {"loss": 1 / update, "stage": 1 + deep, "depth": 2 + 2 * deep, "wall": clock}.items():
                train.add_scalar(name, value, update, walltime=clock)
    text = write_report([read_run(tmp_path / "slowed", "slowed")], tmp_path / "report")
    sentence = "stage 1 took 3.000 s an update with 2 layers, and stage 2 1.000 s with 4. Other work"
    assert text.splitlines()[-1].startswith(sentence)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert sentence in page and "<dd>0.50× (not reliable)</dd>" in page


def test_a_speed_up_that_is_not_known_is_a_dash(tmp_path):
    with SummaryWriter(tmp_path / "short" / "tensorboard" / "train_inner") as train:
        for update in (1, 2):
            for name, value in {"loss": 1, "stage": update, "depth": 2 * update, "wall": update}.items():
                train.add_scalar(name, value, update, walltime=1000 + update)
    write_report([read_run(tmp_path / "short", "short")], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<dd>–</dd>" in page and "×" not in page


def test_validations_are_found_by_the_name_of_their_subset(tmp_path):
    for tag, value in (("train_inner", 1.0), ("dev", 2.0), ("other", 3.0)):
        with SummaryWriter(tmp_path / "tensorboard" / tag) as writer:
            for update in (1, 2):
                for name in ("loss", "stage", "depth", "wall"):
                    writer.add_scalar(name, value, update, walltime=1000 + update + 0.1 * value)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("dataset: {valid_subset: 'dev,other'}")
    read = read_run(tmp_path, "run")
    assert read.valid["loss"].values.tolist() == [2.0, 2.0]
    assert read.costs == [pytest.approx(0.8)]  # 1.1 to 2.1, and the second subset ended at 1.3


def test_all_similarities_have_one_scale_and_labels():
    high, low = np.full((3, 3), 0.95), np.full((5, 5), 0.42)
    lowest = lowest_similarity([high, low, np.full((2, 2), np.nan)])
    assert lowest == pytest.approx(0.4) and lowest_similarity([high]) == 0.9
    figures = [draw_growths([GrowthSimilarity(40, high, high)], lowest), draw_similarity(low, lowest)]
    scales = {image.get_clim() for figure in figures for axis in figure.axes for image in axis.images}
    assert scales == {(lowest, 1)}
    before, after, _ = figures[0].axes
    assert before.get_ylabel() == before.get_xlabel() == after.get_xlabel() == "hidden state"
    assert before.get_title(loc="left") == "before update 40: 2 layers"


def test_names_break_between_their_words_and_tables_scroll_in_their_box(run, slow_run, tmp_path):
    (tmp_path / "full_l2l-seed_1").mkdir()
    (tmp_path / "full_l2l-seed_1" / "tensorboard").symlink_to(run / "tensorboard")
    runs, _ = read_runs([tmp_path / "full_l2l-seed_1", slow_run])
    write_report(runs, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert '<th scope="col">full_<wbr>l2l-seed_<wbr>1</th>' in page
    assert "overflow-wrap: anywhere" not in page
    tables = len(re.findall("<table", page))
    assert tables == 3 and len(re.findall(r'<div class="scroll" tabindex="0"><table', page)) == tables


def test_runs_with_the_same_folder_name_go_by_their_paths(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "demo").symlink_to(run)
    runs, reference = read_runs([tmp_path / "a" / "demo"], tmp_path / "b" / "demo")
    assert len(runs) == 1 and reference is runs[0]  # one and the same folder
    for name in ("c", "d"):
        (tmp_path / name / "demo").mkdir(parents=True)
        (tmp_path / name / "demo" / "tensorboard").symlink_to(run / "tensorboard")
    runs, reference = read_runs([tmp_path / "c" / "demo"], tmp_path / "d" / "demo")
    assert [one.name for one in runs] == ["c/demo", "d/demo"] and reference is runs[1]


def test_an_earlier_reports_figures_do_not_stay_behind(run, slow_run, tmp_path):
    for name in ("growths_2.png", "layer_weights.png", "mine.png"):
        (tmp_path / name).write_bytes(b"old")
    write_report([read_run(slow_run, "slow")], tmp_path)
    names = ["index.html", "loss.png", "loss_by_time.png", "mine.png", "stages.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_probes_weights_are_means_over_seeds_and_log_mel_has_none(tmp_path):
    def seeds(*weights):
        return {str(seed): {"test": 0.5, "layer_weights": one} for seed, one in enumerate(weights, start=1)}

    student = {"speaker": seeds([0.2, 0.8], [0.4, 0.6]), "language": seeds([0.5, 0.5])}
    log_mel = {"upstreams": {"log-mel": {"tasks": {"speaker": seeds([1.0])}}}}
    results = {"upstreams": {"student": {"tasks": student}, **log_mel["upstreams"]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    weights = read_layer_weights(tmp_path / "results.json")
    assert list(weights) == ["student"] and list(weights["student"]) == ["speaker", "language"]
    np.testing.assert_allclose(weights["student"]["speaker"], [0.3, 0.7])
    figure = draw_layer_weights(weights)
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(bars, [0.3, 0.7, 0.5, 0.5])
    for content in ("", "{}", "[]", "[1]", json.dumps(log_mel)):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match="--probes .*results.json"):
            read_layer_weights(tmp_path / "results.json")


def test_a_training_without_stages_is_refused(tmp_path):
    with SummaryWriter(tmp_path / "tensorboard" / "train_inner") as writer:
        writer.add_scalar("loss", 1.0, 10)
    with pytest.raises(InputError, match="no scalar 'stage'"):
        read_run(tmp_path, "run")
    with pytest.raises(InputError, match="no TensorBoard event files"):
        read_run(tmp_path / "elsewhere", "run")


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
