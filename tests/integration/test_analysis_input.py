"""What the analysis commands cannot use is named in one line, before any work."""

import json
import logging
import shutil

import pytest
import torch
from conftest import TINY, stock_hubert
from training import ROOT, tiny, train

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main as fairseq_stack
from fairseq_stack.export.fairseq import export_fairseq
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.export.s3prl import export_s3prl


@pytest.fixture(scope="module")
def places(speech, teacher_file, tmp_path_factory):
    """Files and folders by name: a trained student's, and what could be mistaken for them."""
    root = tmp_path_factory.mktemp("places")
    train("librispeech_base", tiny(speech, teacher_file, root / "run", **{"optimization.max_update": 10}))
    found = {"run": root / "run", "checkpoint": root / "run/checkpoints/checkpoint_last.pt", "teacher": teacher_file}
    student = student_from_checkpoint(load_checkpoint(found["checkpoint"]))
    for name, export in (("export", export_huggingface), ("s3prl.pt", export_s3prl), ("fairseq.pt", export_fairseq)):
        export(student, root / name)
        found[name] = root / name
    shapes = {
        "wide": {"encoder_embed_dim": 24},
        "shallow": {"encoder_layers": 6},
        "slow": {"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 6 + [(8,2,2)]"},
    }
    for name, shape in shapes.items():
        model, cfg = stock_hubert(**{**TINY, **shape})
        found[name] = root / f"{name}.pt"
        torch.save({"args": None, "cfg": cfg, "model": model.state_dict()}, found[name])
    found["moved"] = root / "moved.pt"  # its teacher is not where it was
    state = torch.load(found["checkpoint"], weights_only=True)
    state["cfg"]["task"]["teacher"] = "gone.pt"
    torch.save(state, found["moved"])
    shutil.copytree(found["export"], root / "whisper")
    config = json.loads((root / "whisper/config.json").read_text())
    (root / "whisper/config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    found["whisper"] = root / "whisper"
    found["empty"], found["speech"] = root / "empty", root / "speech"
    for folder in ("empty", "speech"):
        found[folder].mkdir()
    for name in ("train.tsv", "valid.tsv"):
        shutil.copy(speech / name, found["speech"])
    shutil.copy(speech / "valid.tsv", found["speech"] / "test.tsv")
    found["test"], found["file"], found["grid"] = found["speech"] / "test.tsv", root / "file", root / "grid.yaml"
    found["file"].write_text("something else\n")
    found["grid"].write_text(
        f"recipe: {ROOT}/examples/interleaved/librispeech_base.yaml\nreference: a\nseeds: [1]\nfields: []\nstudents: {{a: []}}\n"
    )
    return found


@pytest.fixture(autouse=True)
def logging_as_before():
    """The commands silence the libraries for good, since their process ends."""
    yield
    logging.disable(logging.NOTSET)


S3PRL = pytest.mark.s3prl
CASES = [
    ("report {run} --output {file}", "--output {file} is a file; give a folder"),
    ("report {run} --output {file}/report", "{file} is a file and no folder"),
    ("report {empty} --output {out}", "{empty}/tensorboard/train_inner has no TensorBoard event files"),
    ("report {file} --output {out}", "has no TensorBoard event files"),
    ("report {run} --reference {export} --output {out}", "{export}/tensorboard/train_inner has no TensorBoard"),
    ("report {run} --output {out} --student {checkpoint} --speech {test}", "{checkpoint} has no config.json"),
    (
        "report {run} --output {out} --student {whisper} --speech {test}",
        "{whisper} holds a model of type whisper; give",
    ),
    ("report {run} --output {out} --student {export} --speech {empty}", "{empty}: cannot read"),
    ("report {run} --output {out} --student {export} --speech {test} --seconds -5", "--seconds -5"),
    ("report {run} --output {out} --student {export} --speech {test} --seconds nan", "--seconds nan"),
    ("report {run} --output {out} --probes {file}", "--probes {file} has no results of probes"),
    ("held-out {checkpoint} --speech {test} --seconds 0", "--seconds 0"),
    ("held-out {checkpoint} --speech {empty}/test.tsv", "{empty}/test.tsv: cannot read"),
    ("held-out {run} --speech {test}", "{run} is a folder"),
    ("held-out {export} --speech {test}", "{export} is a folder"),
    ("held-out {s3prl.pt} --speech {test}", "{s3prl.pt} holds no model"),
    ("held-out {fairseq.pt} --speech {test}", "{fairseq.pt} is no checkpoint of a distillation"),
    ("held-out {teacher} --speech {test}", "{teacher} is no checkpoint of a distillation"),
    (
        "held-out {moved} --speech {test}",
        "task.teacher=gone.pt, which does not exist; give its new path with --teacher",
    ),
    ("held-out {checkpoint} --speech {test} --teacher {wide}", "{wide} is not the teacher of {checkpoint}"),
    (
        "held-out {checkpoint} --speech {test} --teacher {shallow}",
        "it has 6 layers, and the student has learned from layer 12",
    ),
    ("held-out {checkpoint} --speech {test} --teacher {slow}", "{slow} is not the teacher of {checkpoint}"),
    ("evaluate {export} --speech {speech} --output {out}/r.json", "{speech}/labels.tsv: cannot be read"),
    ("evaluate {export} --speech {empty} --output {out}/r.json", "{empty}/labels.tsv: cannot be read"),
    ("evaluate {export} --speech {speech} --output {empty}", "--output {empty} is a folder; give a file"),
    ("evaluate {checkpoint} --speech {speech} --output {out}/r.json", "{checkpoint} is no export for s3prl"),
    ("evaluate {whisper} --speech {speech} --output {out}/r.json", "{whisper} holds a model of type whisper; give"),
    ("evaluate {run} --speech {speech} --output {out}/r.json", "{run} has no config.json"),
    ("evaluate {export} --speech {speech} --teacher {file} --output {out}/r.json", "{file} is damaged"),
    ("evaluate {export} --speech {speech} --checkpoint {export} --output {out}/r.json", "{export} is a folder"),
    (
        "evaluate {export} --speech {speech} --checkpoint {checkpoint} --teacher {wide} --output {out}/r.json",
        "is not the teacher",
    ),
    (
        "compare {grid} --speech {speech} --teacher {teacher} --output {file}",
        "--output {file} is a file; give a folder",
    ),
    ("compare {grid} --speech {empty} --teacher {teacher} --output {out}", "--speech {empty} has no test.tsv"),
    ("compare {grid} --speech {speech} --teacher {file} --output {out}", "{file} is damaged"),
    ("compare {grid} --speech {speech} --teacher {out} --output {out}", "{out} does not exist"),
    ("compare {file} --speech {speech} --teacher {teacher} --output {out}", "{file} must have the fields"),
    (
        "compare {grid} --speech {speech} --teacher {teacher} --output {out} --probes",
        "{speech}/labels.tsv: cannot be read",
    ),
    ("compare {grid} --speech {speech} --teacher {teacher} --output {out} model.depth=3", "model.depth"),
    (
        "compare {grid} --speech {speech} --teacher {teacher} --output {out} task.mask_prob=0.5",
        "use +task.mask_prob=0.5",
    ),
    ("collect-superb {empty}", "{empty}: has no run of s3prl"),
    ("collect-superb {file}", "{file}: has no run of s3prl"),
]


@pytest.mark.parametrize("line, says", [
    pytest.param(*case, marks=S3PRL) if case[0].startswith("evaluate") or "--probes" in case[0] and "compare" in case[0] else case
    for case in CASES
])  # fmt: skip
def test_it_is_named_in_one_line(line, says, places, tmp_path, capsys):
    def filled(text):
        for name, place in {**places, "out": tmp_path / "out"}.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text

    with pytest.raises(SystemExit) as ended:
        fairseq_stack(filled(line).split())
    message = str(ended.value.code)
    assert message.startswith("error: ") and filled(says) in message and "\n" not in message
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()
    assert places["file"].read_text() == "something else\n" and not list(places["empty"].iterdir())


@pytest.mark.parametrize("place", ["empty", "file", "run"])
def test_the_doctor_names_both_manifests(place, places, capsys):
    with pytest.raises(SystemExit, match="2 to fix"):
        fairseq_stack(["doctor", "--data", str(places[place])])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fix ")]
    assert [line.split(":")[0] for line in lines] == ["fix   train.tsv", "fix   valid.tsv"]


def test_heads_that_have_learned_nothing_are_not_judged(places, tmp_path, capsys):
    state = torch.load(places["checkpoint"], weights_only=True)
    state["cfg"]["criterion"]["intermediate_weight"] = 0.0
    torch.save(state, tmp_path / "last_layer_alone.pt")
    fairseq_stack(["held-out", tmp_path / "last_layer_alone.pt", "--speech", places["test"]])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[3:]] == ["12"]
