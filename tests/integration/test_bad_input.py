"""Bad input ends a training with one line that names the file or field, and with nothing half-written."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
from training import EXAMPLES, ROOT, hydra_train, tiny, train


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def one_line(speech, teacher_file, tmp_path, **overrides):
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path / "run", **overrides))
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not list((tmp_path / "run").rglob("*.pt"))
    return message


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.encoder_layers": 10}, "model.encoder_layers=10 is not divisible by model.stack_stages=4"),
        ({"criterion.teacher_layers": "[4,8,13]"}, "criterion.teacher_layers: 13 is no layer of task.teacher="),
        ({"criterion.teacher_layers": "[6]"}, "choose multiples of 4"),
        ({"model.stack_schedule": "milestones", "+model.stack_milestones": "[3,2,5]"}, "strictly ascending"),
        ({"model.stack_schedule": "milestones", "+model.stack_milestones": "[3,4,99]"}, "max_update=20"),
        ({"model.conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 5"}, "model.conv_feature_layers makes"),
        ({"task.teacher": "/no/such/file.pt"}, "task.teacher=/no/such/file.pt does not exist"),
        ({"task.data": "/no/such/folder"}, "task.data=/no/such/folder does not exist"),
    ],
)
def test_a_field_that_cannot_be(speech, teacher_file, tmp_path, overrides, message):
    assert message in one_line(speech, teacher_file, tmp_path, **overrides)


def test_a_missing_manifest(teacher_file, tmp_path):
    (tmp_path / "data").mkdir()
    assert f"{tmp_path}/data/valid.tsv" in one_line(tmp_path / "data", teacher_file, tmp_path)


def manifest(folder, files):
    for split in ("train", "valid"):
        (folder / f"{split}.tsv").write_text("\n".join([str(folder), *files]) + "\n")
    return folder


def test_a_listed_file_that_is_missing(teacher_file, tmp_path):
    message = one_line(manifest(tmp_path, ["gone.wav\t16000"]), teacher_file, tmp_path)
    assert f"{tmp_path}/gone.wav: does not exist" in message


def test_audio_shorter_than_one_frame(teacher_file, tmp_path):
    soundfile.write(tmp_path / "click.wav", np.zeros(399), 16_000)
    message = one_line(manifest(tmp_path, ["click.wav\t399"]), teacher_file, tmp_path)
    assert "click.wav" in message and "399 samples" in message


def damaged(tmp_path, kind):
    path = tmp_path / "audio.wav"
    if kind == "unreadable":
        path.write_bytes(b"RIFF but not really")
    elif kind == "empty":
        soundfile.write(path, np.zeros(0), 16_000)
    else:
        soundfile.write(path, np.zeros(16_000), 8_000)
    good = [f"good{number}.wav\t16000" for number in range(3)]  # fairseq drops batches that are not full
    for line in good:
        soundfile.write(tmp_path / line.split("\t")[0], np.zeros(16_000), 16_000)
    return manifest(tmp_path, [*good, "audio.wav\t16000"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "kind, message", [("unreadable", "cannot be read as audio"), ("empty", "no samples"), ("rate", "8000 Hz")]
)
def test_damaged_audio_is_named_whoever_reads_it(teacher_file, tmp_path, kind, message, workers):
    said = one_line(damaged(tmp_path, kind), teacher_file, tmp_path, **{"dataset.num_workers": workers})
    assert "audio.wav" in said and message in said


def test_a_teacher_that_is_no_checkpoint(speech, tmp_path):
    (tmp_path / "teacher.pt").write_text("not a checkpoint")
    assert "teacher.pt" in one_line(speech, tmp_path / "teacher.pt", tmp_path)


def test_a_teacher_that_needs_code_to_unpickle_runs_none(speech, tmp_path):
    torch.save({"model": {}, "cfg": Hostile(tmp_path / "ran")}, tmp_path / "teacher.pt")
    message = one_line(speech, tmp_path / "teacher.pt", tmp_path)
    assert "teacher.pt" in message and "could run code" in message
    assert not (tmp_path / "ran").exists()
    # The file is as hostile as it claims to be.
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


def test_the_shell_sees_one_line_and_a_failure(speech, teacher_file, tmp_path):
    # Of what fairseq finds by itself, before it imports the user_dir.
    overrides = [
        *tiny(speech, teacher_file, "run"),
        f"common.user_dir={ROOT}/fairseq_stack",
        "lr_scheduler._name=cosine",
    ]
    run = hydra_train("librispeech_base", overrides, config_dir=EXAMPLES / "interleaved", cwd=tmp_path)
    output, _ = run.communicate()
    assert run.returncode == 1 and "Traceback" not in output
    assert output.splitlines()[-1].startswith(
        "error: lr_scheduler.total_num_update is no field of lr_scheduler._name=cosine; take it out (~lr_scheduler."
    )
