"""Damaged input of every kind ends in success or in one line, never in a traceback or a hang."""

import copy
import io
import json
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from training import EXAMPLES, ROOT, tiny
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.checkpoint import load_checkpoint, student_from_checkpoint
from fairseq_stack.data.audio import read_any_audio, read_audio
from fairseq_stack.data.manifest import missing_files, read_manifest
from fairseq_stack.data.speech import SpeechDataset
from fairseq_stack.errors import InputError
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.teachers import load_teacher

SECONDS = 20  # for one input; the slowest takes a fraction of one
# How many inputs of each kind, more than 1,000 in all.
AUDIO, MANIFESTS, CONFIGS, FILES, CONTENTS, FOLDERS = 400, 200, 250, 150, 150, 150


@contextmanager
def in_time():
    def hangs(signum, frame):
        raise AssertionError(f"takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(function, *arguments):
    """Whether it succeeds; anything but success and one line fails the test."""
    with in_time():
        try:
            function(*arguments)
            return True
        except (InputError, SystemExit) as error:
            line = str(error)
            assert line and "\n" not in line and "\r" not in line
            assert isinstance(error, InputError) or line.startswith("error: ")
            return False


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
    made = {}
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("MP3", None)):
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format=kind, subtype=subtype)
        made[f"{kind} {subtype}"] = file.getvalue()
    return list(made.values())


def test_audio(recordings, tmp_path):
    chosen, successes = random.Random(1), 0
    path = tmp_path / "audio.wav"

    def use():
        samples = read_audio(path, 1000, 2500)
        assert samples.shape == (1500,) and np.isfinite(samples).all()

    def use_whole():
        samples, rate = read_any_audio(path)
        assert samples.ndim == 1 and len(samples) > 0 and np.isfinite(samples).all() and rate > 0

    for number in range(AUDIO):
        path.write_bytes(damaged(recordings[number % len(recordings)], chosen))
        successes += outcome(use if number % 2 else use_whole)
    assert 0 < successes < AUDIO


# Manifests


def test_manifests(recordings, tmp_path):
    chosen, successes = random.Random(2), 0
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes(recordings[0])
    whole = f"{tmp_path}\na.wav\t3000\nb.wav\t3000\nc.wav\t3000\n".encode()
    path = tmp_path / "train.tsv"
    tricks = [b"../", b"/etc/passwd\t9", b"\t\t", b"\n\n", b"-", b"9" * 30, b"\0", b"\r\n", b"\xff\xfe", b"a.wav\t3000\n"]

    def use():
        manifest = read_manifest(path)
        if missing_files(manifest):
            raise InputError("files are missing")
        dataset = SpeechDataset(manifest, 2000, 1, random_crop=True)
        batch = dataset.collater([dataset[int(index)] for index in dataset.ordered_indices()])
        assert len(batch["utterances"]) + len(batch["problems"]) == len(manifest)
        assert all("\n" not in line for line in batch["problems"].values())

    for number in range(MANIFESTS):
        if number % 2:
            path.write_bytes(damaged(whole, chosen))
        else:
            place = chosen.randrange(len(whole))
            path.write_bytes(whole[:place] + chosen.choice(tricks) + whole[place:])
        successes += outcome(use)
    assert 0 < successes < MANIFESTS


# Configurations


VALUES = [
    "-1", "0", "1", "2", "3", "7", "13", "0.5", "-0.5", "1e400", "nan", "inf", "-inf", "null", "true", "''", "'a b'",
    "[]", "[0]", "[1,2,3]", "[a]", "[[1]]", "{}", "{a: 1}", "abc", "'[(8,10,5)]'", "'[(0,0,0)]'", "'[(8,10,5)] * 99'",
    "'__import__(\"os\")'", "'[(8,10,5)'", "/", "../..", "'\u2028'", "'a\\nb'", "equal", "none", "gstack", "plateau",
    "temporal_gram", "prediction", "layer_norm", "reset", "skip",
]  # fmt: skip


@pytest.fixture(scope="module")
def composed(speech, teacher_file, tmp_path_factory):
    from fairseq.dataclass.initialize import hydra_init
    from hydra import compose, initialize_config_dir

    import fairseq_stack.criterions
    import fairseq_stack.models
    import fairseq_stack.tasks  # noqa: F401

    hydra_init("librispeech_base")
    overrides = tiny(speech, teacher_file, tmp_path_factory.mktemp("run"))
    with initialize_config_dir(config_dir=str(EXAMPLES / "interleaved")):
        return compose(config_name="librispeech_base", overrides=[*overrides, f"common.user_dir={ROOT}/fairseq_stack"])


def test_configurations(composed):
    from fairseq import tasks
    from fairseq.dataclass.initialize import add_defaults
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from fairseq_stack.criterions.layer_distillation import LayerDistillationConfig
    from fairseq_stack.models.stacked_hubert import StackedHubertConfig
    from fairseq_stack.tasks.speech_distillation import SpeechDistillationConfig

    nodes = {"task": SpeechDistillationConfig, "criterion": LayerDistillationConfig, "model": StackedHubertConfig}
    names = [f"{node}.{field.name}" for node, kind in nodes.items() for field in fields(kind) if field.name[0] != "_"]
    parser, chosen, successes = OverridesParser.create(), random.Random(3), 0

    def use(name, value):
        cfg = copy.deepcopy(composed)
        override = parser.parse_override(f"{name}={value}")  # as hydra reads a command line
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, name, override.value(), merge=False)
        add_defaults(cfg)
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
        add_defaults(cfg)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
        criterion = task.build_criterion(cfg.criterion)
        task.load_dataset("valid")
        dataset = task.dataset("valid")
        loss, size, _ = task.valid_step(dataset.collater([dataset[0], dataset[1]]), model.eval(), criterion)
        assert torch.isfinite(loss) and size > 0

    assert len(names) > 40
    for number in range(CONFIGS):
        successes += outcome(use, names[number % len(names)], chosen.choice(VALUES))
    assert 0 < successes < CONFIGS


# Checkpoints of teachers and students


@pytest.fixture(scope="module")
def student(composed):
    """The content of a student's checkpoint."""
    from fairseq import tasks
    from fairseq.dataclass.initialize import add_defaults
    from omegaconf import OmegaConf

    cfg = copy.deepcopy(composed)
    add_defaults(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    return {"cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), "model": model.state_dict()}


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
    chosen, successes = random.Random(4), 0
    torch.save(student, tmp_path / "student.pt")
    kinds = [(teacher_file.read_bytes(), use_teacher), ((tmp_path / "student.pt").read_bytes(), use_student)]
    path = tmp_path / "damaged.pt"
    for number in range(FILES):
        whole, use = kinds[number % 2]
        path.write_bytes(damaged(whole, chosen))
        successes += outcome(use, path)
    assert successes < FILES


ODD = [None, True, -1, 0, 3, 7.5, float("nan"), "", "abc", "[(8,10,5)]", [], [1], {}, {"a": 1}, torch.zeros(0), torch.zeros(3)]


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
    chosen, successes = random.Random(5), 0
    kinds = [(torch.load(teacher_file, weights_only=True), use_teacher), (student, use_student)]
    path = tmp_path / "odd.pt"
    for number in range(CONTENTS):
        whole, use = kinds[number % 2]
        torch.save(odd_content(whole, chosen), path)
        successes += outcome(use, path)
    assert 0 < successes < CONTENTS


# Folders in Hugging Face's format


def test_folders(tmp_path):
    chosen, successes = random.Random(6), 0
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    HubertModel(config).save_pretrained(whole)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(whole)
    fields_of = {name: json.loads((whole / name).read_text()) for name in ("config.json", "preprocessor_config.json")}
    odd = [value for value in ODD if not torch.is_tensor(value)]
    for number in range(FOLDERS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = chosen.choice(["config.json", "config.json", "preprocessor_config.json", "model.safetensors"])
        if name in fields_of and number % 2:
            content = dict(fields_of[name])
            content[chosen.choice(list(content))] = chosen.choice(odd)
            (folder / name).write_text(json.dumps(content))
        else:
            (folder / name).write_bytes(damaged((whole / name).read_bytes(), chosen))
        successes += outcome(use_teacher, folder)
    assert 0 < successes < FOLDERS


def test_a_damaged_student_writes_no_export(student, tmp_path):
    """Whatever of a student's content is wrong, an export is whole or there is none."""
    chosen = random.Random(7)
    for number in range(20):
        path, folder = tmp_path / f"{number}.pt", tmp_path / f"export{number}"
        torch.save(odd_content(student, chosen), path)
        if outcome(lambda: export_huggingface(student_from_checkpoint(load_checkpoint(path), str(path)), folder)):
            HubertModel.from_pretrained(folder)
        else:
            assert not folder.exists()
