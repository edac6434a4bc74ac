"""The probes measure what they say: known answers are found, noise is not, and nothing is measured twice."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import LINKED, TINY, stock_hubert
from training import tiny, train
from transformers import HubertModel

from fairseq_stack.analysis.intervals import mean_and_interval
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.data import prepare
from fairseq_stack.data.manifest import write_lines, write_manifest
from fairseq_stack.data.splits import SPLITS, choose_splits
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation import heads
from fairseq_stack.evaluation.cost import count_parameters, multiply_adds
from fairseq_stack.evaluation.results import run_probes, upstream_rows
from fairseq_stack.evaluation.tasks import (
    Fold,
    LabelledRecording,
    Task,
    find_tasks,
    plain_text,
    read_labelled_speech,
)
from fairseq_stack.evaluation.upstreams import (
    TeacherUpstream,
    load_export,
    load_log_mel,
    load_random,
)
from fairseq_stack.export.distiller import export_distiller
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.export.onnx import export_onnx
from fairseq_stack.export.s3prl import export_s3prl

ROOT = Path(__file__).parents[2]
WIDTH = 8
SHAPE = SimpleNamespace(num_layers=3, hidden_sizes=[WIDTH] * 3, downsample_rates=[320] * 3)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A random student of 12 layers x 16 as a folder and as two files."""
    folder = tmp_path_factory.mktemp("exports")
    model, cfg = stock_hubert(**TINY)
    pretraining = ("mask_emb", "final_proj", "label_embs")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(pretraining)}
    cfg["model"].update(_name="stacked_hubert", stack_method="none", stack_stages=1, **LINKED)
    state = {"model": {**weights, "stage": torch.tensor(0.0)}, "cfg": cfg}
    export_huggingface(student_from_checkpoint(state), folder / "student")
    export_s3prl(student_from_checkpoint(state), folder / "student.pt")
    export_onnx(student_from_checkpoint(state), folder / "student.onnx")
    export_onnx(student_from_checkpoint(state), folder / "weighted.onnx", hidden_states="weighted")
    for name in ("layer_norm.weight", "layer_norm.bias"):
        del state["model"][name]
    cfg["model"].update(feature_layer_norm=False, intermediate_style="prediction", output_weight=1.0)
    for name, width in (("distiller.pt", 16), ("narrow.pt", 4)):
        state["model"].update({"heads.12.weight": torch.zeros(width, 16), "heads.12.bias": torch.zeros(width)})
        export_distiller(student_from_checkpoint(state), folder / name)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Prepared speech with labels: two speakers, who say rising and falling sweeps, 40 prompts each."""
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(0)
    recordings, samples = [], {}
    (folder / "audio/low").mkdir(parents=True)
    (folder / "audio/high").mkdir()
    for number in range(40):
        for speaker, pitch in (("low", 0.05), ("high", 0.3)):
            utterance = f"{speaker}/sweep{number}"  # a number alone would be no prompt
            sweep = pitch * np.linspace(1, 2, 4000 + 40 * number)[:: 1 if number % 2 else -1]
            wave = 0.3 * np.sin(np.cumsum(sweep)) + 0.01 * generator.standard_normal(len(sweep))
            soundfile.write(folder / f"audio/{utterance}.flac", wave, 16_000)
            samples[utterance] = len(wave)
            text = f"Number {number}, please!" if speaker == "low" else ""
            recordings.append(prepare.Recording(None, utterance, speaker, "en", text))
    split = choose_splits(recordings, {})
    rows = ("\t".join(getattr(recording, label) for label in prepare.LABELS) for recording in recordings)
    write_lines(folder / "labels.tsv", ["\t".join(prepare.LABELS), *rows])
    for name in SPLITS:
        entries = [(f"{utterance}.flac", samples[utterance]) for utterance in samples if split[utterance] == name]
        write_manifest(folder / f"{name}.tsv", folder / "audio", entries)
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 16)
    monkeypatch.setattr(heads, "CTC_STEPS", 16)


# Tasks


def test_no_prompt_of_the_test_was_learned_from(labelled):
    tasks, without = find_tasks(read_labelled_speech(labelled))
    assert [task.name for task in tasks] == ["speaker", "recognition"]
    assert without.keys() == {"language", "keyword"}
    for task in tasks:
        (fold,) = task.folds
        prompts = [
            {recording.utterance.split("/")[1] for recording, _ in part} for part in (fold.train, fold.valid, fold.test)
        ]
        assert all(prompts)
        assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def keyword(language, speaker, word):
    labels = {"language": language, "speaker": speaker, "keyword": word, "text": ""}
    return LabelledRecording(f"{language}/{speaker}/{word}", "", 16_000, "train", labels)


def test_keywords_are_tested_in_a_voice_that_was_not_learned_from_in_a_language_that_was():
    voices = [("en", "Ann"), ("es", "Ann"), ("es", "Bea"), ("fr", "Cleo"), ("fr", "Dora")]
    tasks, _ = find_tasks([keyword(*voice, word) for voice in voices for word in "0123456789"])
    (task,) = (task for task in tasks if task.name == "keyword")
    assert task.classes == tuple("0123456789")
    tested = []
    for fold in task.folds:
        train, valid, test = (
            {(recording.labels["language"], recording.labels["speaker"]) for recording, _ in part}
            for part in (fold.train, fold.valid, fold.test)
        )
        assert len(valid) == len(test) == 1 and not train & (valid | test)
        assert {language for language, _ in test} <= {language for language, _ in train}
        tested += test
    assert sorted(tested) == voices[1:]  # English has one voice: nothing to learn its words from
    assert task.chance == 0.1


def test_a_test_speaker_whom_the_training_lacks_leaves_no_speaker_task():
    def recording(split, speaker):
        labels = {"language": "en", "speaker": speaker, "keyword": "", "text": ""}
        return LabelledRecording(f"{split}/{speaker}", "", 16_000, split, labels)

    known = [recording(split, speaker) for split in SPLITS for speaker in ("Ann", "Bea")]
    assert "speaker" not in find_tasks([*known, recording("train", "Cleo")])[1]
    assert "answers that train does not have" in find_tasks([*known, recording("test", "Cleo")])[1]["speaker"]


def test_texts_are_compared_without_case_and_punctuation():
    assert plain_text("Please, don't press  #1!") == "please don't press 1"


# Probes


def recordings(count, texts=None):
    return [LabelledRecording(f"{number}", "", 16_000, "train", {}) for number in range(count)]


def test_an_answer_in_a_hidden_state_is_found_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    pairs = [(recording, "ab"[number % 2]) for number, recording in enumerate(recordings(300))]
    task = Task("speaker", [Fold(pairs[:150], pairs[150:200], pairs[200:])], ("a", "b"))
    noise = {recording.utterance: torch.randn(3, WIDTH, generator=generator) for recording, _ in pairs}
    telling = {utterance: state.clone() for utterance, state in noise.items()}
    for recording, answer in pairs:
        telling[recording.utterance][1] += 2.0 if answer == "a" else -2.0

    found = heads.classify(task, telling, SHAPE, seed=1)
    assert found["test"] == 1.0
    assert np.argmax(found["layer_weights"]) == 1 and math.isclose(sum(found["layer_weights"]), 1, rel_tol=1e-5)
    # 100 fair coins stay within four standard deviations.
    assert 0.3 < heads.classify(task, noise, SHAPE, seed=1)["test"] < 0.7


def test_a_text_in_the_frames_is_recognized_and_noise_is_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = ["".join("abcd"[i] for i in torch.randint(4, (6,), generator=generator)) for _ in range(60)]
    pairs = list(zip(recordings(60), texts))
    task = Task("recognition", [Fold(pairs[:40], pairs[40:50], pairs[50:])], ())
    units = heads.train_units(texts, tmp_path / "units", size=8)
    noise, telling = {}, {}
    for recording, text in pairs:
        frames = 0.1 * torch.randn(3, 4 * len(text), WIDTH, generator=generator)
        noise[recording.utterance] = frames.half()
        # Each letter is said for three frames, with one of silence behind it.
        for place, letter in enumerate(text):
            frames[2, 4 * place : 4 * place + 3, "abcd".index(letter)] += 3.0
        telling[recording.utterance] = frames.half()

    found = heads.recognize(task, telling, SHAPE, units, seed=1)
    assert found["test"] < 0.2
    assert np.argmax(found["layer_weights"]) == 2
    assert heads.recognize(task, noise, SHAPE, units, seed=1)["test"] > 0.5


def test_means_over_time_give_a_linear_probe_what_all_frames_give():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 7, WIDTH, generator=generator)
    probe = heads.Probe(SHAPE, heads.UtteranceLevel, 5)
    with torch.no_grad():
        probe.featurizer.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
        all_frames = probe(list(states), torch.full((4,), 7))
        means = probe(list(states.mean(2, keepdim=True)), torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(means, all_frames)


def test_the_layers_are_weighed_by_a_softmax():
    states = torch.randn(3, 4, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    probe = heads.Probe(SHAPE, heads.FrameLevel, 5)
    with torch.no_grad():
        probe.featurizer.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
        summed, _ = probe.featurizer(list(states), [torch.full((4,), 7)] * 3)
    exponents = [math.exp(0.3), math.exp(-1.0), math.exp(2.0)]
    expected = sum(e / sum(exponents) * state.double() for e, state in zip(exponents, states))
    torch.testing.assert_close(summed.double(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(probe.layer_weights(), [e / sum(exponents) for e in exponents], rtol=1e-5)


@pytest.mark.parametrize(
    "found, wanted, errors", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ab", 0)]
)
def test_the_edit_distance(found, wanted, errors):
    assert heads.edit_distance(found, wanted) == errors


def test_the_interval_is_students():
    # t(0.975, 4) = 2.776, as tables have it; the sample deviation of 1..5 is sqrt(2.5).
    mean, interval = mean_and_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert math.isclose(interval, 2.776 * math.sqrt(2.5 / 5), rel_tol=1e-3)
    assert math.isnan(mean_and_interval([0.5])[1])


# Upstreams


@pytest.mark.parametrize("name", ["student", "student.pt", "distiller.pt"])
def test_a_random_student_has_the_shape_and_not_the_weights(exports, name):
    trained, first, again = load_export(exports / name), load_random(exports / name), load_random(exports / name)
    assert first.hidden_sizes == trained.hidden_sizes and count_parameters(first) == count_parameters(trained)
    waveform = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000])
    with torch.no_grad():
        states = [torch.stack(upstream(*waveform)[0]) for upstream in (trained, first, again)]
    assert torch.equal(states[1], states[2])
    assert (states[0] - states[1]).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["student", "student.pt"])
def test_multiply_adds_are_those_counted_by_hand(exports, name):
    frames, total = 16_000, 0
    channels = 1
    for outputs, kernel, stride in [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2:
        frames = (frames - kernel) // stride + 1
        total += frames * outputs * channels * kernel
        channels = outputs
    width, inner = 16, 32
    total += frames * channels * width  # the projection behind the CNN
    total += (frames + 1) * width * (width // 4) * 8  # positions: 4 groups, a kernel of 8, one frame cut off
    total += 12 * frames * (4 * width * width + 2 * width * inner)  # projections of 12 layers
    total += 12 * 2 * frames * frames * width  # attention: scores and sums
    assert multiply_adds(load_export(exports / name), seconds=1) == total


def test_the_teacher_is_probed_on_the_hidden_states_that_it_teaches(teacher_file):
    upstream = TeacherUpstream(teacher_file)
    waveform = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    states, lengths = upstream(waveform, torch.tensor([8000]))
    taught = upstream.teacher.hidden_states(waveform, torch.tensor([8000]), [0, 4, 12])
    assert len(states) == 13 and lengths[0].tolist() == [24]
    for layer, state in taught.items():
        assert torch.equal(states[layer], state)


def test_what_is_no_export_is_refused(tmp_path, teacher_file):
    (tmp_path / "empty").mkdir()
    torch.save({"model_weight": Path("x")}, tmp_path / "code.pt")  # a class that only code could make
    for path in (tmp_path / "empty", tmp_path / "code.pt", tmp_path / "missing.pt", teacher_file):
        with pytest.raises(InputError, match="fairseq-stack export"):
            load_export(path)


def test_an_onnx_file_is_probed_on_the_same_hidden_states(exports, tmp_path):
    ours, stock = load_export(exports / "student.onnx"), load_export(exports / "student")
    assert (ours.num_layers, ours.hidden_sizes, ours.downsample_rates) == (13, stock.hidden_sizes, [320] * 13)
    assert multiply_adds(ours) is None
    source = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (states, (frames, *_)), (expected, _) = (model(source, torch.tensor([8000])) for model in (ours, stock))
    for state, other in zip(states, expected):
        assert torch.allclose(state, other[:, : state.size(1)], atol=1e-4)
    assert frames.tolist() == [24] == [states[0].size(1)]
    with pytest.raises(InputError, match="weighted.onnx has a weighted sum alone"):
        load_export(exports / "weighted.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="broken.onnx cannot be loaded by onnxruntime"):
        load_export(tmp_path / "broken.onnx")
    rows = upstream_rows([exports / "student.onnx"])
    assert "random student" not in rows  # an ONNX file does not say how to build one


def test_the_cost_of_exports_is_compared_with_the_first(exports, teacher_file, capsys):
    paths = [str(exports / name) for name in ("student.onnx", "student")]
    main(["cost", *paths, "--teacher", str(teacher_file), "--seconds", "1", "--runs", "2"])
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    )
    assert header == ["model", "M parameters", "MB", "of the first", "real-time factor", "of the first"]
    assert [row[0] for row in rows] == [*paths, "teacher"] and rows[0][3] == "1.00" and rows[0][5] == "1.00"
    assert all(float(row[4]) > 0 for row in rows)


def test_frames_that_s3prl_cannot_count_are_refused(exports, tmp_path):
    model = HubertModel.from_pretrained(exports / "student")
    model.config.update(
        {"num_feat_extract_layers": 4, "conv_dim": (8,) * 4, "conv_kernel": (10, 3, 3, 3), "conv_stride": (5, 2, 2, 2)}
    )
    HubertModel(model.config).save_pretrained(tmp_path)
    shutil.copy(exports / "student/preprocessor_config.json", tmp_path)
    with pytest.raises(InputError, match="a frame of 40 samples"):
        load_export(tmp_path)


def test_predictions_of_another_width_cannot_be_weighed_with_the_layers(exports):
    with pytest.raises(InputError, match="--to huggingface$"):  # which takes every student, as --to s3prl does not
        load_export(exports / "narrow.pt")


# Runs


def test_a_restart_repeats_nothing(labelled, tmp_path, quick):
    file = tmp_path / "results.json"
    loaded = []

    def load():
        loaded.append(1)
        return load_log_mel()

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probes({"first": ("a", load), "second": ("b", stopped)}, labelled, [1], file)
    assert json.loads(file.read_text())["upstreams"]["first"]["tasks"].keys() == {"speaker", "recognition"}

    run_probes({"first": ("a", stopped), "second": ("b", load)}, labelled, [1], file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    results = run_probes({"first": ("a", stopped), "second": ("b", stopped)}, labelled, [1], file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert len(loaded) == 2
    # The same features and seed give the same score.
    assert results["upstreams"]["first"]["tasks"] == results["upstreams"]["second"]["tasks"]

    with pytest.raises(KeyboardInterrupt):  # another seed is new, and so is another model of the same name
        run_probes({"first": ("a", stopped)}, labelled, [1, 2], file)
    with pytest.raises(KeyboardInterrupt):
        run_probes({"first": ("changed", stopped)}, labelled, [1], file)


def test_two_exports_of_one_name_are_refused(exports, tmp_path):
    (tmp_path / "student").symlink_to(exports / "student")
    with pytest.raises(InputError, match="named student"):
        upstream_rows([exports / "student", tmp_path / "student"])


def test_the_script_prints_a_table_and_keeps_every_number(
    exports, labelled, teacher_file, tmp_path, quick, monkeypatch, capsys
):
    output_file = tmp_path / "probes.json"
    arguments = [
        "evaluate", str(exports / "student"), "--speech", str(labelled), "--teacher", str(teacher_file),
        "--seeds", "2", "--output", str(output_file),
    ]  # fmt: skip
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert rows.keys() >= {"student", "teacher", "random student", "log-mel", "most frequent answer"}
    assert "±" in rows["student"]
    assert any(line.startswith("no language: ") for line in lines)
    results = json.loads(output_file.read_text())
    entry = results["upstreams"]["student"]
    for scores in entry["tasks"].values():
        assert scores.keys() == {"1", "2"}
        for score in scores.values():
            assert len(score["layer_weights"]) == entry["layers"] == 13
            assert math.isclose(sum(score["layer_weights"]), 1, rel_tol=1e-5)
    # Two pitches are told apart by any spectrum.
    assert results["upstreams"]["log-mel"]["tasks"]["speaker"]["1"]["test"] == 1.0

    # The variance explained comes with a checkpoint, if it has heads; else that is said before anything is computed.
    for loss in ("temporal_gram", "mse"):
        fields = {"+criterion.output_weight": 0.0, "+criterion.loss": loss, "optimization.max_update": 1}
        train("full_l2l", tiny(labelled, teacher_file, tmp_path / loss, **fields), folder="stacking")
        capsys.readouterr()
        checkpoint = tmp_path / loss / "checkpoints/checkpoint_last.pt"
        main([*arguments, "--checkpoint", checkpoint])
        output = capsys.readouterr()
        with_heads = loss == "mse"
        assert lines[0] in output.out and ("share of the held-out" in output.out) is with_heads
        assert output.err.startswith("note: no held-out variance: ") is not with_heads
        kept = json.loads(output_file.read_text())
        assert kept["upstreams"] == results["upstreams"] and ("held_out_variance" in kept) is with_heads
    assert list(kept["held_out_variance"]["shares"]) == ["4", "8", "12"]
