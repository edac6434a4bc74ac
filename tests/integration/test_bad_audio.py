"""A few recordings that cannot be used are skipped and logged, more stop the training, and nothing hangs."""

import os
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from training import tiny, train

from fairseq_stack.data.audio import read_audio
from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.doctor import examine_speech
from fairseq_stack.tasks.speech_distillation import SpeechDistillation

GOOD = 10
SAMPLES = 8000


def noise(samples=SAMPLES, seed=0, scale=0.1):
    return scale * np.random.default_rng(seed).standard_normal(samples)


def cut_off(path):
    soundfile.write(path, noise(), 16_000, format="FLAC")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_header(path):
    soundfile.write(path, noise(), 8_000)


def no_number(path):
    samples = noise().astype("float32")
    samples[100] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def zero_length(path):
    soundfile.write(path, noise(0), 16_000)


def integers_as_floats(path):
    soundfile.write(path, 32768 * noise(), 16_000, subtype="FLOAT")


def zero_bytes(path):
    path.touch()


def no_audio(path):
    path.write_bytes(os.urandom(20_000))


DAMAGES = {
    cut_off: "cannot be read as audio",
    wrong_header: "8000 Hz",
    no_number: "samples that are not finite",
    zero_length: "has no samples",
    integers_as_floats: "but full scale is 1",
    zero_bytes: "cannot be read as audio",
    no_audio: "cannot be read as audio",
}


@pytest.fixture
def data(tmp_path):
    """A function that makes manifests: ten good recordings, and for training what it is told."""

    def make(*damages):
        for number in range(GOOD):
            soundfile.write(tmp_path / f"good{number}.wav", noise(seed=number), 16_000)
        for damage in damages:
            damage(tmp_path / f"{damage.__name__}.wav")
        good = [f"good{number}.wav\t{SAMPLES}" for number in range(GOOD)]
        bad = [f"{damage.__name__}.wav\t{SAMPLES}" for damage in damages]
        for split, lines in (("train", good + bad), ("valid", good)):
            (tmp_path / f"{split}.tsv").write_text("\n".join([str(tmp_path), *lines]) + "\n")
        return tmp_path

    return make


def run(data, teacher_file, folder, **fields):
    overrides = tiny(data, teacher_file, folder, **fields)
    return train("librispeech_base", overrides)


def skipped(caplog):
    return [line for line in caplog.messages if line.startswith("bad audio | skipped ")]


# Four recordings a batch, and one, where a bad one leaves a batch with nothing in it.
@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_damage_is_skipped_and_logged_once_with_its_reason(
    data, teacher_file, tmp_path, caplog, workers, batch_size
):
    caplog.set_level("INFO")
    fields = {
        "+task.bad_audio_limit": 0.45,
        "dataset.batch_size": batch_size,
        "dataset.num_workers": workers,
        "dataset.disable_validation": True,
        "optimization.max_update": 2 * (GOOD + len(DAMAGES)) // batch_size + 4,
    }
    trainer = run(data(*DAMAGES), teacher_file, tmp_path / "run", **fields)
    assert trainer.get_num_updates() == fields["optimization.max_update"]
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    lines = skipped(caplog)
    assert len(lines) == len(DAMAGES)
    for damage, reason in DAMAGES.items():
        (line,) = [line for line in lines if f"{damage.__name__}.wav" in line]
        assert reason in line and "\n" not in line


def test_one_bad_recording_in_a_hundred_is_skipped_by_default_and_two_stop(data, teacher_file, tmp_path, caplog):
    folder = data(zero_length, no_number)
    lines = (folder / "train.tsv").read_text().splitlines()
    more = [f"more{number}.wav\t{SAMPLES}" for number in range(10, 100)]
    for line in more:
        (folder / line.split("\t")[0]).write_bytes((folder / "good0.wav").read_bytes())
    fields = {"dataset.batch_size": 20, "optimization.max_update": 12}
    (folder / "train.tsv").write_text("\n".join([*lines[:-1], *more[:89]]) + "\n")
    trainer = run(folder, teacher_file, tmp_path / "one", **fields)
    assert trainer.get_num_updates() == 12 and len(skipped(caplog)) == 1
    (folder / "train.tsv").write_text("\n".join([*lines, *more]) + "\n")
    with pytest.raises(SystemExit) as ended:
        run(folder, teacher_file, tmp_path / "two", **fields)
    message = ended.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert (
        f"(2 of 102 recordings in {folder}/train.tsv cannot be used" in message
        and "task.bad_audio_limit=0.01" in message
    )


@pytest.mark.parametrize("store, workers", [(False, 0), (True, 2)])
def test_recordings_shorter_than_a_frame_are_skipped_and_change_nothing_else(
    data, teacher_file, tmp_path, caplog, store, workers
):
    """Skipped and named once, they leave the run that a manifest without them gives; more than the limit stop it."""
    folder = data()
    good = (folder / "train.tsv").read_text()
    for number, samples in enumerate((1, 399)):
        soundfile.write(folder / f"click{number}.wav", noise(samples), 16_000)
    clicks = "click0.wav\t1\nclick1.wav\t399\n"
    root, _, lines = good.partition("\n")
    weights = []
    for name, text in (("without", good), ("with", f"{root}\n{clicks}{lines}")):
        (folder / "train.tsv").write_text(text)
        fields = {"+task.bad_audio_limit": 0.2, "dataset.num_workers": workers, "dataset.batch_size": 1,
                  "task.max_sample_size": 3000, "optimization.max_update": 12}  # fmt: skip
        if store:
            fields["+task.target_store"] = tmp_path / f"{name}_targets"
        weights.append(run(folder, teacher_file, tmp_path / name, **fields).model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert [line.split(": ")[1] for line in skipped(caplog)] == [
        "has 1 samples at 16 kHz, but one frame takes 400; remove it",
        "has 399 samples at 16 kHz, but one frame takes 400; remove it",
    ]
    if not store:
        with pytest.raises(SystemExit, match=r"click0.wav: has 1 samples .* \(2 of 12 recordings in .*train.tsv"):
            run(folder, teacher_file, tmp_path / "stopped", **{**fields, "+task.bad_audio_limit": 0.15})


def test_the_doctor_counts_as_the_training_does(data, tmp_path):
    folder = data()
    soundfile.write(folder / "click.wav", noise(399), 16_000)
    lines = (folder / "train.tsv").read_text() + "click.wav\t399\n"
    more = [f"more{number}.wav" for number in range(89)]
    for name in more:
        (folder / name).write_bytes((folder / "good0.wav").read_bytes())
    (folder / "train.tsv").write_text(lines + "".join(f"{name}\t{SAMPLES}\n" for name in more))
    finding = next(examine_speech(folder))
    assert finding.verdict == "note" and "99 recordings" in finding.text
    assert "click.wav: has 399 samples" in finding.text
    (folder / "train.tsv").write_text(lines)
    finding = next(examine_speech(folder))
    assert finding.verdict == "fix" and "1 of 11 recordings" in finding.text
    integers_as_floats(folder / "valid.wav")
    (folder / "valid.tsv").write_text(f"{folder}\nvalid.wav\t{SAMPLES}\n")
    assert [f.verdict for f in examine_speech(folder)] == ["fix", "fix"]


def test_fail_stops_at_the_first(data, teacher_file, tmp_path, caplog):
    with pytest.raises(SystemExit) as ended:
        run(data(no_audio), teacher_file, tmp_path / "run", **{"+task.bad_audio": "fail", "+task.bad_audio_limit": 0.5})
    assert ended.value.code.startswith(f"error: {tmp_path}/no_audio.wav: ") and not skipped(caplog)


@pytest.mark.parametrize("field, value", [("bad_audio", "ignore"), ("bad_audio_limit", 1.5), ("bad_audio_limit", -1)])
def test_a_field_that_cannot_be(data, teacher_file, tmp_path, field, value):
    with pytest.raises(SystemExit, match=f"error: task.{field}={value}"):
        run(data(), teacher_file, tmp_path / "run", **{f"+task.{field}": value})


def test_a_resumed_run_equals_the_uninterrupted_one_with_bad_recordings_too(data, teacher_file, tmp_path, monkeypatch):
    fields = {"+task.bad_audio_limit": 0.45, "dataset.batch_size": 2, "checkpoint.save_interval_updates": 11,
              "dataset.disable_validation": True, "optimization.max_update": 14}  # fmt: skip
    folder = data(*DAMAGES)
    whole = run(folder, teacher_file, tmp_path / "whole", **fields).model.state_dict()
    train_step = SpeechDistillation.train_step

    def interrupted(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == 11:
            raise KeyboardInterrupt
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    monkeypatch.setattr(SpeechDistillation, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, teacher_file, tmp_path / "killed", **fields)
    monkeypatch.setattr(SpeechDistillation, "train_step", train_step)
    resumed = run(folder, teacher_file, tmp_path / "killed", **fields).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_recordings_that_vanish_while_training_are_skipped_and_again_after_a_resume(
    data, teacher_file, tmp_path, monkeypatch, caplog
):
    folder = data()
    train_step = SpeechDistillation.train_step

    def vanishing(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == 4:
            (folder / "good3.wav").unlink()
            (folder / "valid.tsv").write_text((folder / "valid.tsv").read_text().replace("good3.wav\t8000\n", ""))
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    monkeypatch.setattr(SpeechDistillation, "train_step", vanishing)
    fields = {"+task.bad_audio_limit": 0.1, "dataset.disable_validation": True}
    run(folder, teacher_file, tmp_path / "run", **fields)
    monkeypatch.setattr(SpeechDistillation, "train_step", train_step)
    (line,) = skipped(caplog)
    assert f"{folder}/good3.wav: cannot be read (No such file or directory)" in line
    trainer = run(folder, teacher_file, tmp_path / "run", **fields, **{"optimization.max_update": 30})
    assert trainer.get_num_updates() == 30 and len(skipped(caplog)) == 2


def test_clipped_speech_is_speech(data, teacher_file, tmp_path, caplog):
    def clipped(path):
        soundfile.write(path, np.clip(noise(scale=10), -1, 1), 16_000)

    trainer = run(data(clipped), teacher_file, tmp_path / "run", **{"+task.bad_audio": "fail"})
    assert trainer.get_num_updates() == 20 and not skipped(caplog)


def test_ten_hours_in_one_file_cost_the_memory_of_a_crop(tmp_path):
    samples = 10 * 3600 * 16_000
    path = tmp_path / "day.wav"
    soundfile.write(path, noise(16_000), 16_000, subtype="PCM_16")
    header = bytearray(path.read_bytes()[:44])
    header[4:8] = (36 + 2 * samples).to_bytes(4, "little")
    header[40:44] = (2 * samples).to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(44 + 2 * samples)  # a hole: hours of silence that take no disk
        file.seek(44 + 2 * (samples - 10_000))
        file.write((noise(10_000, scale=3000)).astype("<i2").tobytes())
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\nday.wav\t{samples}\n")
    dataset = SpeechDataset(read_manifest(tmp_path / "train.tsv"), 160_000, 1, random_crop=True)
    tracemalloc.start()
    try:
        crops = [dataset.collater([dataset[0]]) for _ in range(3)]
        assert read_audio(path, samples - 10_000, samples).any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(crop["waveforms"].shape == (1, 160_000) and not crop["problems"] for crop in crops)
    assert peak < 10e6  # bytes; the file has 1.15e9
