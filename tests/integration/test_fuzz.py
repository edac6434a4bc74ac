"""Damaged input of every kind ends in success or in one line, never in a traceback or a hang."""

import copy
import io
import json
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from training import ROOT, composed, tiny
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

import fairseq_stack
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.data.audio import any_audio, read_audio
from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.data.manifest import missing_files, read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.export.student import export
from fairseq_stack.export.verify import ExportMismatch
from fairseq_stack.teachers import load_teacher

SECONDS = 20  # for one input; the slowest takes a fraction of one
INPUTS = {
    "audio": 400,
    "manifests": 200,
    "configurations": 250,
    "files of checkpoints": 150,
    "contents of checkpoints": 150,
    "exports of students": 60,
    "folders": 150,
}


def test_the_inputs_are_more_than_a_thousand():
    assert sum(INPUTS.values()) > 1000


def fuzz(kind, use):
    """Call use(number, chosen), chosen being random numbers, for every input of a kind; some have to succeed, some to fail."""
    chosen, successes = random.Random(kind), 0
    for number in range(INPUTS[kind]):
        try:
            successes += outcome(use, number, chosen)
        except (Exception, Hang) as error:
            raise AssertionError(f"input {number} of the {kind}") from error
    assert 0 < successes < INPUTS[kind]


def outcome(use, *arguments):
    """Whether it succeeds; it may also fail with one line."""
    with in_time():
        try:
            use(*arguments)
            return True
        except (InputError, ExportMismatch, SystemExit) as error:
            line = str(error)
            assert line and "\n" not in line and "\r" not in line
            assert line.startswith("error: ") or not isinstance(error, SystemExit)
            return False


class Hang(BaseException):
    """No Exception, which the code under test might catch."""


@contextmanager
def in_time():
    def hangs(signum, frame):
        raise Hang(f"takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(content, chosen):
    """Bytes with one kind of damage: cut off, flipped, overwritten, taken out, put in, or exchanged."""
    content = bytearray(content)
    place = chosen.randrange(len(content))
    # Headers are where damage does the most.
    place = min(place, chosen.randrange(200)) if chosen.random() < 0.5 else place
    end = place + chosen.choice([1, 4, 64, 1000])
    kind = chosen.randrange(6)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        for _ in range(chosen.randrange(1, 10)):
            content[chosen.randrange(len(content)) if chosen.random() < 0.5 else place] ^= 1 << chosen.randrange(8)
    elif kind == 2:
        content[place:end] = chosen.choice([b"\0", b"\xff", b"\x7f"]) * (end - place)
    elif kind == 3:
        del content[place:end]
    elif kind == 4:
        content[place:place] = chosen.randbytes(end - place)
    else:
        content[place:end] = content[: end - place]
    return bytes(content)


# Audio


@pytest.fixture(scope="module")
def recordings():
    samples = 0.1 * np.random.default_rng(0).standard_normal(3000)
    made = []
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("MP3", None)):
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format=kind, subtype=subtype)
        made.append(file.getvalue())
    return made


def test_audio(recordings, tmp_path):
    path = tmp_path / "audio.wav"

    def use(number, chosen):
        path.write_bytes(damaged(recordings[number % len(recordings)], chosen))
        if number % 2:
            samples = read_audio(path, 1000, 2500)  # a crop, as training reads it
            assert samples.shape == (1500,) and np.isfinite(samples).all()
        else:
            rate, blocks = any_audio(path)
            samples = np.concatenate(list(blocks))
            assert samples.ndim == 1 and len(samples) > 0 and np.isfinite(samples).all() and rate > 0

    fuzz("audio", use)


# Manifests


TRICKS = [b"../", b"/etc/passwd\t9", b"\t\t", b"\n\n", b"-", b"9" * 30, b"\0", b"\r\n", b"\xff\xfe", b"a.wav\t3000\n"]


def test_manifests(recordings, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes(recordings[0])
    whole = f"{tmp_path}\na.wav\t3000\nb.wav\t3000\nc.wav\t3000\n".encode()
    path = tmp_path / "train.tsv"

    def use(number, chosen):
        place = chosen.randrange(len(whole))
        trick = whole[:place] + chosen.choice(TRICKS) + whole[place:]
        path.write_bytes(damaged(whole, chosen) if number % 2 else trick)
        manifest = read_manifest(path)
        files = [Path(manifest.path(index)).resolve() for index in range(len(manifest))]
        assert all(file.is_relative_to(Path(manifest.root).resolve()) for file in files)
        if missing_files(manifest):
            raise InputError("files are missing")
        dataset = SpeechDataset(manifest, 2000, 1, random_crop=True)
        batch = dataset.collater([dataset[int(index)] for index in dataset.ordered_indices()])
        assert len(batch["utterances"]) + len(batch["problems"]) == len(manifest)
        assert all("\n" not in line for line in batch["problems"].values())

    fuzz("manifests", use)


# Configurations


VALUES = [
    "-1", "0", "1", "2", "3", "7", "13", "0.5", "-0.5", "1e400", "nan", "inf", "-inf", "null", "true", "''", "'a b'",
    "[]", "[0]", "[1,2,3]", "[a]", "[[1]]", "{}", "{a: 1}", "abc", "'[(8,10,5)]'", "'[(0,0,0)]'", "'[(8,10,5)] * 99'",
    "'__import__(\"os\")'", "'[(8,10,5)'", "/dev/null", "../..", "'\u2028'", "'a\\nb'", "equal", "none", "gstack", "plateau",
    "temporal_gram", "prediction", "layer_norm", "reset", "skip",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(speech, teacher_file, tmp_path_factory):
    """A recipe as hydra composes it, its interpolations open."""
    from fairseq.dataclass.initialize import hydra_init

    fairseq_stack.register()
    hydra_init("librispeech_base")
    overrides = tiny(speech, teacher_file, tmp_path_factory.mktemp("run"))
    return composed("librispeech_base", [*overrides, f"common.user_dir={ROOT}/fairseq_stack"])


def resolved(cfg):
    """As fairseq-hydra-train hands a configuration to fairseq."""
    from fairseq.dataclass.initialize import add_defaults
    from omegaconf import OmegaConf

    add_defaults(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return cfg


def test_configurations(recipe, tmp_path, monkeypatch):
    from fairseq import optim, tasks
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from fairseq_stack.criterions.layer_distillation import LayerDistillationConfig
    from fairseq_stack.models.stacked_hubert import StackedHubertConfig
    from fairseq_stack.tasks.speech_distillation import SpeechDistillationConfig

    nodes = {"task": SpeechDistillationConfig, "criterion": LayerDistillationConfig, "model": StackedHubertConfig}
    names = [f"{node}.{field.name}" for node, kind in nodes.items() for field in fields(kind) if field.name[0] != "_"]
    parser = OverridesParser.create()
    (tmp_path / "some/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "some/where")  # a field may be a folder to write to

    def use(number, chosen):
        cfg = copy.deepcopy(recipe)
        override = parser.parse_override(f"{names[number % len(names)]}={chosen.choice(VALUES)}")
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
        cfg = resolved(cfg)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
        criterion = task.build_criterion(cfg.criterion)
        optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
        for update, split in ((0, "train"), (cfg.optimization.max_update - 1, "train"), (0, "valid")):
            task.load_dataset(split)
            batch = task.dataset(split).collater([task.dataset(split)[index] for index in (0, 1)])
            if split == "train":
                loss, size, _ = task.train_step(batch, model, criterion, optimizer, update)
            else:
                loss, size, _ = task.valid_step(batch, model.eval(), criterion)
            assert torch.isfinite(loss) and size > 0

    assert len(names) > 40
    fuzz("configurations", use)


# Checkpoints of teachers and students


@pytest.fixture(scope="module")
def student(recipe):
    """The content of a student's checkpoint."""
    from fairseq import tasks
    from omegaconf import OmegaConf

    cfg = resolved(copy.deepcopy(recipe))
    weights = tasks.setup_task(cfg.task).build_model(cfg.model).state_dict()
    return {
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": weights,
        "optimizer_history": [{"num_updates": 20}],
        "extra_state": {"best": 0.5, "val_loss": 0.5, "previous_training_time": 60.0, "ema": dict(weights)},
    }


def hear(teacher):
    """A teacher that loads also has to work."""
    waveforms = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    if teacher.frames(16_000) > 0:
        teacher.hidden_states(waveforms, torch.tensor([16_000, 12_000]), [teacher.depth])


def use_teacher(path):
    hear(load_teacher(path))


def use_student(path):
    student_from_checkpoint(load_checkpoint(path), str(path))


def test_files_of_checkpoints(teacher_file, student, tmp_path):
    torch.save(student, tmp_path / "student.pt")
    kinds = [(teacher_file.read_bytes(), use_teacher), ((tmp_path / "student.pt").read_bytes(), use_student)]
    path = tmp_path / "damaged.pt"

    def use(number, chosen):
        whole, load = kinds[number % 2]
        path.write_bytes(damaged(whole, chosen))
        load(path)

    fuzz("files of checkpoints", use)


ODD = [
    None,
    True,
    -1,
    0,
    3,
    7.5,
    10**9,
    float("nan"),
    "",
    "abc",
    "[(8,10,5)]",
    [],
    [1],
    {},
    {"a": 1},
    torch.zeros(0),
    torch.zeros(3),
]


def odd_content(state, chosen):
    """A checkpoint with a wrong value somewhere in its configuration or weights, or without one."""
    state = copy.deepcopy(state)
    part = state
    while True:
        key = chosen.choice(list(part))
        # Mostly what shapes the model, whose fields are few beside fairseq's.
        key = chosen.choice([key, *(name for name in ("cfg", "model", "task") if name in part)])
        if isinstance(part[key], dict) and part[key] and chosen.random() < 0.95:
            part = part[key]
            continue
        if chosen.random() < 0.2:
            del part[key]
        else:
            part[key] = chosen.choice(ODD)
        return state


def test_contents_of_checkpoints(teacher_file, student, tmp_path):
    kinds = [(torch.load(teacher_file, weights_only=True), use_teacher), (student, use_student)]
    path = tmp_path / "odd.pt"

    def use(number, chosen):
        whole, load = kinds[number % 2]
        torch.save(odd_content(whole, chosen), path)
        load(path)

    fuzz("contents of checkpoints", use)


def test_exports_of_students_are_whole_or_not_there(student, tmp_path):
    path = tmp_path / "student.pt"

    def use(number, chosen):
        torch.save(odd_content(student, chosen), path)
        output = tmp_path / "exports" / str(number)
        output.parent.mkdir(exist_ok=True)
        try:
            export(path, ["huggingface", "fairseq", "s3prl"][number % 3], output, ema=number % 2 == 1)
        finally:
            left = sorted(path.name for path in output.parent.iterdir())
            shutil.rmtree(output.parent)
            assert left in ([], [output.name], [output.name, f"{output.name}.verification.json"])
        assert left

    fuzz("exports of students", use)


# Folders in Hugging Face's format


def test_folders(tmp_path):
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    HubertModel(config).save_pretrained(whole)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(whole)
    fields_of = {name: json.loads((whole / name).read_text()) for name in ("config.json", "preprocessor_config.json")}
    odd = [value for value in ODD if not torch.is_tensor(value)]

    def use(number, chosen):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = chosen.choice(["config.json", "config.json", "preprocessor_config.json", "model.safetensors"])
        if name in fields_of and number % 2:
            content = dict(fields_of[name])
            content[chosen.choice(list(content))] = chosen.choice(odd)
            (folder / name).write_text(json.dumps(content))
        else:
            (folder / name).write_bytes(damaged((whole / name).read_bytes(), chosen))
        use_teacher(folder)

    fuzz("folders", use)
