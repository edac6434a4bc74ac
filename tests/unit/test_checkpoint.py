"""Checkpoints are read without running what is in them, and a student is what its stage uses."""

import argparse
import collections
import operator
import os
import pathlib
import typing

import fairseq.utils
import numpy as np
import pytest
import torch
from conftest import TINY, stock_hubert
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from omegaconf import DictConfig, OmegaConf

import fairseq_stack.training.guards  # noqa: F401
from fairseq_stack.checkpoints.read import DamagedCheckpoint, configurations, load_checkpoint
from fairseq_stack.checkpoints.stand_ins import plain
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.errors import InputError


class Runs:
    """An object that calls a function when it is unpickled, and then sets a state if there is one."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Harmless:
    pass


def the_line(error):
    """The message of an InputError, which has one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_fairseq_dictionary_is_read_as_data(tmp_path):
    dictionary = Dictionary()
    for label in ("0", "1", "2"):
        dictionary.add_symbol(label)
    model, cfg = stock_hubert(dictionary=dictionary, **TINY)
    path = tmp_path / "hubert.pt"
    task_state = {"dictionaries": [dictionary]}
    torch.save({"cfg": cfg, "model": model.state_dict(), "task_state": task_state}, path)

    state = load_checkpoint(path)
    (stand_in,) = state["task_state"]["dictionaries"]
    assert not isinstance(stand_in, Dictionary)
    assert stand_in.symbols == dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "0", "1", "2"]
    assert torch.equal(state["model"]["encoder.layers.3.fc1.weight"], model.encoder.layers[3].fc1.weight)


OPTIONS = {"model": {"_name": "wav2vec2", "encoder_layers": 3, "latent_temp": [2, 0.5]}, "task": {"normalize": True}}


@pytest.mark.parametrize("zipped", [True, False])
def test_configurations_are_read_from_the_objects_that_fairseq_has_pickled(zipped, tmp_path):
    path = tmp_path / "file.pt"
    inner = argparse.Namespace(arch="wav2vec2", data=pathlib.Path("/a/b"), best=np.float64(1.5))
    beside = {
        "args": argparse.Namespace(arch="wav2vec_ctc", w2v_args=inner, normalize=False),
        "extra_state": {"best": np.float64(1.5), "history": np.arange(3)},
        "meters": collections.defaultdict(list, {"loss": [1, 2]}),
        "types": [typing.Any, typing.Optional[int], dict, type(None)],  # noqa: UP045
    }
    state = {"model": {"weight": torch.ones(2)}, "cfg": OmegaConf.create(OPTIONS), **beside}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(path)
    assert configurations(read) == (OPTIONS["model"], OPTIONS["task"])
    assert read["meters"] == {"loss": [1, 2]} and read["model"]["weight"].tolist() == [1, 1]
    del read["cfg"]
    model, task = configurations(read)
    assert model["_name"] == "wav2vec_ctc" and task["normalize"] is False
    assert model["w2v_args"]["arch"] == "wav2vec2" and model["w2v_args"]["data"] == "/a/b"


def with_payload(holder, payload):
    """An object of the kind that is read as data, with an object inside that would do harm."""
    if holder is DictConfig:
        holder = OmegaConf.create({"model": {}})
        vars(holder)["_content"]["model"] = payload
    else:
        holder = holder()
        holder.payload = payload
    return holder


@pytest.mark.parametrize("holder", [Dictionary, argparse.Namespace, DictConfig])
@pytest.mark.parametrize(
    "function, code, name",
    [(os.system, "touch {}", "posix.system"), (eval, "open({!r}, 'w').close()", "eval")],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, function, code, name, zipped, holder):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pt"
    payload = Runs(function, code.format(str(trace)))
    state = {"model": {}, "args": with_payload(holder, payload)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)

    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert str(path) in the_line(error) and name in the_line(error)
    assert not trace.exists()

    # The same file does run under an unsafe load, so that the assertion above can fail.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_name_that_is_read_as_data_calls_nothing_of_that_name(zipped, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    plugin = tmp_path / f"plugin_{zipped}"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n")
    options = argparse.Namespace(user_dir=str(plugin))
    state = {"model": {}, "args": Runs(fairseq.utils.import_user_module, options)}
    state["cfg"] = Runs(operator.getitem, {"model": {"a": 1}}, "model")
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(path)
    assert configurations(read) == (None, None) and not marker.exists()
    with pytest.raises(InputError, match="needs .* to unpickle, and that could run code"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))  # by which fairseq resumes: it would look the names up
    assert not marker.exists()
    torch.load(path, weights_only=False)  # so that the assertion above can fail
    assert marker.exists()


ODD_STATES = [
    "text",
    [1, 2],
    (None, {"arguments": "slot"}),
    ({"a": 1}, {"__class__": "other"}),
    {"__class__": "other", "__setstate__": "other", "__dict__": 1, "arguments": 1},
    {1: 2, None: 3},
    {"_content": "???"},
    {"_val": torch.ones(1)},
]


@pytest.mark.parametrize("state", ODD_STATES, ids=str)
@pytest.mark.parametrize("kind", [argparse.Namespace, DictConfig, pathlib.PurePosixPath, Dictionary])
def test_odd_states_of_known_objects_are_data_like_any_other(kind, state, tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"model": {}, "cfg": Runs(kind, state=state), "args": {"model": {}}}, path)
    assert configurations(load_checkpoint(path)) == (None, None)


def test_what_holds_itself_or_holds_much_in_little_space_costs_nothing(tmp_path):
    path = tmp_path / "bomb.pt"
    bomb, deep, own = [], [], argparse.Namespace(arch="hubert")
    for _ in range(64):
        bomb = [bomb, bomb]  # written out, it would have 2 ** 64 entries
    for _ in range(100):
        deep = [deep]
    own.own = own
    torch.save({"model": {}, "args": own, "bomb": bomb, "deep": deep}, path)
    read = load_checkpoint(path)
    model, task = configurations(read)
    assert model["own"] is task and task["own"] is task
    plain(read["bomb"])
    assert plain(read["deep"]) == deep
    for _ in range(100_000):
        deep = [deep]
    assert plain(deep) is None


def test_what_others_allow_stays_theirs(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"model": {}, "object": Harmless()}, path)
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Harmless])
    try:
        torch.load(path, weights_only=True)
        with pytest.raises(InputError, match="Harmless"):
            load_checkpoint(path)
        torch.load(path, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("damage", [lambda content: content[100:], lambda content: content.replace(b"1234", b"1235")])
def test_a_damaged_checkpoint_is_told_from_one_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "file.pt"
    torch.save({"model": {"weight": torch.tensor(list(b"1234" * 100), dtype=torch.uint8)}}, path)
    load_checkpoint(path)
    path.write_bytes(damage(path.read_bytes()))
    # To newer versions of Python's zipfile, what lacks its beginning is no zip file.
    said = ": it is cut off or damaged", ": the checksum of .* is wrong", " is damaged or not a checkpoint"
    with pytest.raises(DamagedCheckpoint, match=f"{path}({'|'.join(said)})"):
        load_checkpoint(path)


def test_a_whole_file_in_another_protocol_is_not_called_damaged(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "file.pt", pickle_protocol=4)
    with pytest.raises(InputError, match="another protocol than 2, torch's own; if you trust the file") as error:
        load_checkpoint(tmp_path / "file.pt")
    assert not isinstance(error.value, DamagedCheckpoint)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "list", "no model"])
def test_what_is_not_a_checkpoint_gives_one_line_with_its_path(tmp_path, kind):
    path = tmp_path / "file.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("config: model\n" * 50)
    elif kind == "truncated":
        torch.save({"model": {"weight": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "no model":
        torch.save({"cfg": {}}, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert str(path) in the_line(error)


def student_state(stage, **shape):
    """A checkpoint of a student of 12 layers in 4 stages, its weights those of a random HuBERT."""
    model, cfg = stock_hubert(**TINY, **shape)
    left_out = ("mask_emb", "final_proj", "label_embs")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(left_out)}
    weights.update({"heads.12.weight": torch.zeros(4, 16), "heads.12.bias": torch.zeros(4)})
    weights["stage"] = torch.tensor(float(stage))
    cfg["model"].update(_name="stacked_hubert", stack_method="interleaved", stack_stages=4)
    return {"model": weights, "cfg": cfg}


def test_a_student_is_the_layers_of_its_stage_renumbered():
    state = student_state(stage=1)
    state["model"]["plateau"] = torch.zeros(4, dtype=torch.float64)  # the plateau schedule's, no weight
    student = student_from_checkpoint(state)
    assert student.depth == 6
    # Stage 2 of 4 uses A1 A2 B1 B2 C1 C2 of A1..A4 B1..B4 C1..C4.
    for index, seat in enumerate([0, 1, 4, 5, 8, 9]):
        ours = student.weights[f"encoder.layers.{index}.fc1.weight"]
        assert torch.equal(ours, state["model"][f"encoder.layers.{seat}.fc1.weight"])
    assert not any(name.startswith(("encoder.layers.6", "heads", "stage", "plateau")) for name in student.weights)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True},
    ],
)
def test_a_students_tensors_are_those_of_fairseqs_hubert(shape):
    state = student_state(stage=3, **shape)
    student = student_from_checkpoint(state)
    backbone = {name for name in state["model"] if not name.startswith(("heads.", "stage"))}
    assert student.depth == 12 and set(student.weights) == backbone


def test_half_precision_becomes_single():
    state = student_state(stage=0)
    state["model"] = {name: value.half() for name, value in state["model"].items()}
    assert {value.dtype for value in student_from_checkpoint(state).weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda state: state["model"].pop("encoder.layers.4.fc1.bias"), "encoder.layers.4.fc1.bias"),
        (lambda state: state["model"].update(extra=torch.zeros(1)), "extra"),
        (lambda state: state["model"].update({"layer_norm.bias": torch.zeros(9)}), "layer_norm.bias.*9,"),
        (lambda state: state["model"].update(stage=torch.tensor(4.0)), "stage 4.0"),
        (lambda state: state["model"].update(stage=torch.tensor(float("nan"))), "stage nan"),
        (lambda state: state["model"].pop("stage"), "stage"),
        (lambda state: state["cfg"]["model"].update(_name="hubert"), "hubert.*stacked_hubert"),
        (lambda state: state["cfg"]["model"].update(conv_feature_layers="exit()"), "conv_feature_layers"),
        (lambda state: state["cfg"]["model"].pop("encoder_embed_dim"), "encoder_embed_dim"),
        (lambda state: state["cfg"]["task"].pop("normalize"), "normalize"),
        (lambda state: state.pop("cfg"), "configuration"),
    ],
)
def test_a_checkpoint_that_is_not_a_whole_student_gives_one_line(damage, words):
    state = student_state(stage=0)
    damage(state)
    with pytest.raises(InputError, match=words) as error:
        student_from_checkpoint(state, "student.pt")
    the_line(error)


def test_a_seat_that_sleeps_may_hold_anything():
    state = student_state(stage=0)
    state["model"]["encoder.layers.1.fc1.bias"] = torch.full((1,), float("nan"))
    assert student_from_checkpoint(state).depth == 3
