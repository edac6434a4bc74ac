"""The probes measure what they say: known answers are found, noise is not, and nothing is measured twice."""

import hashlib
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import LINKED, TINY, stock_hubert
from s3prl.metric import compute_eer
from training import EXAMPLES, tiny, train
from transformers import HubertModel

from fairseq_stack.analysis.intervals import bootstrap, mean_and_interval, percentile_interval
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.data.manifest import write_lines, write_manifest
from fairseq_stack.data.recordings import LABELS, Recording
from fairseq_stack.data.splits import SPLITS, choose_splits
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation import ctc, heads
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
from fairseq_stack.evaluation.verification import equal_error_rate, verify
from fairseq_stack.experiment.comparison import Comparison
from fairseq_stack.experiment.grid import read_grid
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
            recordings.append(Recording(None, utterance, speaker, "en", text))
    split = choose_splits(recordings, {})
    rows = ("\t".join(getattr(recording, label) for label in LABELS) for recording in recordings)
    write_lines(folder / "labels.tsv", ["\t".join(LABELS), *rows])
    for name in SPLITS:
        entries = [(f"{utterance}.flac", samples[utterance]) for utterance in samples if split[utterance] == name]
        write_manifest(folder / f"{name}.tsv", folder / "audio", entries)
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 16)
    monkeypatch.setattr(ctc, "STEPS", 16)


# Tasks


def test_no_prompt_of_the_test_was_learned_from(labelled):
    tasks, without = find_tasks(read_labelled_speech(labelled))
    assert [task.name for task in tasks] == ["speaker", "recognition"]
    assert without.keys() == {"language", "keyword", "phoneme", "verification"}
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


def said(split, speaker, number):
    labels = {"language": "en", "speaker": speaker, "keyword": "", "text": ""}
    return LabelledRecording(f"{split}/{speaker}/{number}", "", 16_000, split, labels)


def test_a_verified_speaker_is_no_training_speaker_of_the_fold():
    sizes = dict(zip("abcdefghijk", (9, 9, 8, 8, 7, 6, 5, 4, 3, 2, 1)))
    shared = [said(split, speaker, n) for split in SPLITS for speaker, size in sizes.items() for n in range(size)]
    (task,) = (task for task in find_tasks(shared)[0] if task.name == "verification")
    assert task.metric == "equal error rate" and len(task.folds) == 5
    tested = []
    for fold in task.folds:
        parts = [{speaker for _, speaker in part} for part in (fold.train, fold.valid, fold.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(sizes)
        assert all(recording.split == split for split, part in zip(SPLITS, (fold.train, fold.valid, fold.test))
                   for recording, _ in part)  # fmt: skip
        tested += parts[2]
    assert sorted(tested) == list(sizes)

    # Splits by speaker, such as LibriSpeech's, are kept.
    apart = [said(split, split + speaker, n) for split in SPLITS for speaker in "abc" for n in range(2)]
    (task,) = (task for task in find_tasks(apart)[0] if task.name == "verification")
    (fold,) = task.folds
    assert [len(part) for part in (fold.train, fold.valid, fold.test)] == [6, 6, 6]

    one = [pair for pair in apart if pair.split != "train" or pair.labels["speaker"] == "traina"]
    assert find_tasks(one)[1]["verification"] == "train has fewer than two speakers"
    few = [said(split, speaker, n) for split in SPLITS for speaker in "abcde" for n in range(2)]
    assert "the number of speakers is 5; at least 6" in find_tasks(few)[1]["verification"]
    once = [said(split, speaker, 0) for split in SPLITS for speaker in "abcdef"]
    assert "no two recordings of one speaker" in find_tasks(once)[1]["verification"]


def test_phones_are_those_of_the_first_ten_seconds_without_silence(labelled, tmp_path):
    for name in ("labels", *SPLITS):
        shutil.copy(labelled / f"{name}.tsv", tmp_path)
    lines = [f"low/sweep{number}\tpau a bb a pau\t0.1 0.5 9.5 10.0 11.0" for number in range(40)]
    write_lines(tmp_path / "phones.tsv", ["utterance\tphones\tends", *lines])
    (task,) = (task for task in find_tasks(read_labelled_speech(tmp_path))[0] if task.name == "phoneme")
    (fold,) = task.folds
    assert {answer for part in (fold.train, fold.valid, fold.test) for _, answer in part} == {"a bb a"}
    assert len(fold.train) + len(fold.valid) + len(fold.test) == 40  # nothing is known of the other speaker's phones
    assert task.metric == "phoneme error rate"
    write_lines(tmp_path / "phones.tsv", ["utterance\tphones\tends", "low/sweep0\ta"])
    with pytest.raises(InputError, match=r"phones\.tsv:2: has 2 fields instead of 3; prepare again"):
        read_labelled_speech(tmp_path)


def test_texts_are_recognized_in_the_language_that_has_most():
    def spoken(split, language, number, text="Ahoj."):
        labels = {"language": language, "speaker": "", "keyword": "", "text": text}
        return LabelledRecording(f"{split}/{language}/{number}", "", 16_000, split, labels)

    known = [spoken(split, language, number) for split in SPLITS for language, count in (("cs", 3), ("en", 2))
             for number in range(count)]  # fmt: skip
    silent = [spoken("train", "en", number, text="") for number in range(2, 9)]
    (task,) = (task for task in find_tasks([*known, *silent])[0] if task.name == "recognition")
    assert {recording.labels["language"] for recording in task.recordings.values()} == {"cs"}


def test_labels_may_have_columns_of_their_own(labelled, tmp_path):
    for name in ("labels", *SPLITS):
        shutil.copy(labelled / f"{name}.tsv", tmp_path)
    header, *lines = (tmp_path / "labels.tsv").read_text().splitlines()
    write_lines(tmp_path / "labels.tsv", [f"mood\t{header}", *(f"calm\t{line}" for line in lines)])
    ours, theirs = read_labelled_speech(tmp_path), read_labelled_speech(labelled)
    assert {one.labels["mood"] for one in ours} == {"calm"}
    assert [one.labels["text"] for one in ours] == [one.labels["text"] for one in theirs]
    write_lines(tmp_path / "labels.tsv", [header.replace("keyword", "word"), *lines])
    with pytest.raises(InputError, match=r"labels\.tsv:1: lacks the column keyword"):
        read_labelled_speech(tmp_path)


def test_texts_are_compared_without_case_and_punctuation():
    assert plain_text("Please, don't press  #1!") == "please don't press 1"


def test_letters_of_all_languages_stay_whole_in_texts():
    assert plain_text("Don\N{RIGHT SINGLE QUOTATION MARK}t!") == "don't"
    assert plain_text("Cafe\N{COMBINING ACUTE ACCENT}.") == "café"  # two signs, as macOS writes it
    assert plain_text("नमस्ते दुनिया।") == "नमस्ते दुनिया"


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


@pytest.mark.parametrize("units_of, space", [(partial(ctc.text_units, size=6), ""), (ctc.phone_units, " ")])
def test_a_text_in_the_frames_is_recognized_and_noise_is_not(units_of, space, monkeypatch):
    monkeypatch.setattr(ctc, "STEPS", 400)
    generator = torch.Generator().manual_seed(0)
    texts = ["".join("abcd"[i] for i in torch.randint(4, (6,), generator=generator)) for _ in range(60)]
    pairs = [(recording, space.join(text)) for recording, text in zip(recordings(60), texts)]
    task = Task("recognition", [Fold(pairs[:40], pairs[40:50], pairs[50:])], ())
    noise, telling = {}, {}
    for (recording, _), text in zip(pairs, texts):
        frames = 0.1 * torch.randn(3, 4 * len(text), WIDTH, generator=generator)
        noise[recording.utterance] = frames.half()
        # Each letter is said for three frames, with one of silence behind it.
        for place, letter in enumerate(text):
            frames[2, 4 * place : 4 * place + 3, "abcd".index(letter)] += 3.0
        telling[recording.utterance] = frames.half()

    found = ctc.recognize(task, telling, SHAPE, 1, units_of)
    assert found["test"] < 0.2
    assert np.argmax(found["layer_weights"]) == 2
    assert ctc.recognize(task, noise, SHAPE, 1, units_of)["test"] > 0.5

    too_short = {utterance: frames[:, :2] for utterance, frames in telling.items()}
    with pytest.raises(InputError, match="no training recording of the task recognition is long enough for its text"):
        ctc.recognize(task, too_short, SHAPE, 1, units_of)


def test_a_speaker_in_a_hidden_state_is_verified_and_noise_is_not(monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 64)
    generator = torch.Generator().manual_seed(0)
    voices = {speaker: 3.0 * torch.randn(WIDTH, generator=generator) for speaker in "abcdefghijkl"}
    made = [said(split, speaker, n) for split in SPLITS for speaker in voices for n in range(8)]
    (task,) = (task for task in find_tasks(made)[0] if task.name == "verification")
    noise = {recording.utterance: torch.randn(3, WIDTH, generator=generator) for recording in made}
    telling = {utterance: state.clone() for utterance, state in noise.items()}
    for recording in made:
        telling[recording.utterance][1] += voices[recording.labels["speaker"]]
    found = verify(task, telling, SHAPE, seed=1)
    assert found["test"] < 0.15 and np.argmax(found["layer_weights"]) == 1
    low, high = percentile_interval(found["resampled"])
    assert low < found["test"] < high < 0.25
    assert verify(task, noise, SHAPE, seed=1)["test"] > 0.35


@pytest.mark.parametrize(
    "same, different, rate",
    [
        ((0.9, 0.6, 0.4), (0.7, 0.3, 0.2, 0.1), 1 / 4),  # at 0.4 none is missed, at 0.6 one of three; both accept 0.7
        ((0.9, 0.5), (0.7, 0.3), 1 / 2),
        ((0.9, 0.8), (0.7, 0.3), 0),
        ((0.1,), (0.2, 0.3), 1),
        ((0.5, 0.5), (0.5, 0.5, 0.5), 1 / 2),
        # From 1/3 missed and none accepted to none missed and all accepted, the rates meet at 1/4.
        ((0.9, 0.8, 0.5), (0.5, 0.5), 1 / 4),
    ],
)
def test_the_equal_error_rate(same, different, rate):
    scores = np.array([*same, *different])
    of_one = np.arange(len(scores)) < len(same)
    assert equal_error_rate(scores, of_one) == pytest.approx(rate)
    assert math.isnan(equal_error_rate(scores, np.ones_like(of_one)))


def test_the_equal_error_rate_is_s3prls_and_weights_count_pairs():
    generator = np.random.default_rng(0)
    same = generator.random(200) < 0.3
    scores = np.round(generator.standard_normal(200) + same, 1)  # with ties
    assert equal_error_rate(scores, same) == pytest.approx(compute_eer(same.tolist(), scores.tolist())[0])
    weights = generator.integers(0, 4, 200)
    repeated = equal_error_rate(scores.repeat(weights), same.repeat(weights))
    assert equal_error_rate(scores, same, weights) == pytest.approx(repeated)


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
    assert ctc.edit_distance(found, wanted) == errors


def test_errors_are_counted_in_phones_or_in_characters():
    found, wanted = ["aa b c", "x", ""], ["aa b d e", "x", "y"]
    # c is for d, and e and y are missing: a PER of 3 / 6.
    assert [counts.tolist() for counts in ctc.count_errors(found, wanted, str.split)] == [[2, 0, 1], [4, 1, 1]]
    assert [counts.tolist() for counts in ctc.count_errors(found, wanted, list)] == [[3, 0, 1], [8, 1, 1]]


def test_every_sign_of_a_text_is_a_unit():
    texts = [f"{chr(code)} {chr(code + 1)}" for code in range(0x3B1, 0x3B1 + 100)]
    units = ctc.text_units(texts)
    assert units.decode(units.encode(texts[40])) == texts[40]


def test_the_bootstraps_interval_is_that_of_a_binomial_and_differences_are_paired():
    hits = np.arange(200) < 150
    resampled = np.array(bootstrap(200, lambda times: times @ hits / 200))
    low, high = percentile_interval(resampled)
    # 0.75 +- 1.96 sqrt(0.75 * 0.25 / 200) = 0.69 and 0.81
    assert low == pytest.approx(0.69, abs=0.01) and high == pytest.approx(0.81, abs=0.01)
    # Another model is right in ten more recordings: this differs from model to model much less than from test to test.
    more = np.arange(200) < 160
    low, high = percentile_interval(np.array(bootstrap(200, lambda times: times @ more / 200)) - resampled)
    assert low == pytest.approx(0.05 - 0.03, abs=0.006) and high == pytest.approx(0.05 + 0.03, abs=0.006)
    assert percentile_interval([math.nan, 1.0, 2.0], confidence=1.0) == (1.0, 2.0)


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
        upstream_rows([exports / "weighted.onnx"])
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="broken.onnx cannot be loaded by onnxruntime"):
        load_export(tmp_path / "broken.onnx")
    rows = upstream_rows([exports / "student.onnx"])
    assert "random student" not in rows  # an ONNX file does not say how to build one


def test_the_cost_of_exports_is_compared_with_the_first(exports, teacher_file, capsys):
    paths = [str(exports / name) for name in ("student.onnx", "student", "weighted.onnx")]
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


def test_the_script_prints_a_table_and_keeps_every_number(exports, labelled, teacher_file, tmp_path, quick, capsys):
    output_file = tmp_path / "probes.json"
    arguments = [
        "evaluate", str(exports / "student"), "--speech", str(labelled), "--teacher", str(teacher_file),
        "--seeds", "2", "--output", str(output_file),
    ]  # fmt: skip
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert rows.keys() >= {"student", "teacher", "random student", "log-mel", "most frequent answer"}
    assert "±" in rows["student"] and "]" in rows["student"]
    difference = lines.index("difference from student in points, with its 95 % interval over test recordings")
    assert re.fullmatch(r"\| log-mel +(\| +[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] )+\|", lines[difference + 6])
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


# Experiments


def test_an_experiment_probes_its_students_and_again_when_the_labels_change(labelled, teacher_file, quick, tmp_path):
    speech, out, grid = shutil.copytree(labelled, tmp_path / "speech"), tmp_path / "out", tmp_path / "grid.yaml"
    recipe = f"recipe: {EXAMPLES}/interleaved/librispeech_base.yaml"
    students = "students: {full: [model.stack_method=none, model.stack_stages=1, optimization.max_update=3]}"
    grid.write_text(f"{recipe}\nreference: full\nseeds: [1]\nfields: []\n{students}\n")
    others = (
        "common.tensorboard_logdir",
        "checkpoint.save_dir",
        "task.data",
        "task.teacher",
        "optimization.max_update",
    )
    fields = [field for field in tiny("", "", "") if not field.startswith(others)]
    threads = torch.get_num_threads()
    try:
        main([
            "compare", grid, "--output", out, "--speech", speech, "--teacher", teacher_file, "--processes", 1,
            "--probes", *fields,
        ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    student = json.loads((out / "results.json").read_text())["students"]["full"]
    assert set(student["seeds"]["1"]["probes"]) == set(student["probe_intervals"]) == {"speaker", "recognition"}
    assert "Probes, with 95 % intervals" in (out / "summary.md").read_text()

    def due():
        return Comparison(read_grid(grid), out, speech, teacher_file, fields, probes=True).due

    assert not due()
    with open(speech / "labels.tsv", "a") as labels:
        labels.write("low/another\tlow\ten\tAnother prompt.\t\n")
    assert [training.student for training in due()] == ["full"]
