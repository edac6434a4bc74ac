"""The commands of docs/your_data.md lead from a folder of recordings to an exported recognizer."""

import json

import onnx
import pytest
from conftest import S3PRL_FITS
from documented import commands_of, run_command
from training import ROOT, tiny

pytest.importorskip("accelerate", reason="transformers' Trainer needs pip install accelerate")


def test_the_commands_lead_from_recordings_to_an_exported_recognizer(
    tmp_path, speech, teacher_file, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recordings").symlink_to(speech / "audio")
    (tmp_path / "teacher").symlink_to(teacher_file)
    names = sorted(path.name for path in (speech / "audio").iterdir())
    (tmp_path / "transcripts.tsv").write_text("".join(f"{name}\tTake {name[5:-5]}, please!\n" for name in names))
    small = [field for field in tiny("", "", "", **{"optimization.max_update": 12}) if not field.startswith(("task.", "checkpoint.", "common.tensorboard"))]  # fmt: skip
    steps = "--max_steps 2 --per_device_train_batch_size 4 --report_to none --save_strategy no".split()
    for line in commands_of("docs/your_data.md"):
        if "fairseq-stack cost" in line and not S3PRL_FITS:
            continue
        run_command(line, fairseq_hydra_train=small, transformers_ctc=steps)
    said = capsys.readouterr().out
    assert "of characters and" in said and "onnx: recognizer_int8.onnx" in said
    labels = (tmp_path / "speech/labels.tsv").read_text()
    assert f"\tTake {names[0][5:-5]}, please!\t" in labels
    proof = json.loads((tmp_path / "recognizer_int8.onnx.verification.json").read_text())
    assert (proof["precision"], proof["compared_with"]) == ("int8", "transformers' HubertForCTC")
    # 17 letters, with CTC's blank, an unknown letter and the space, are no multiple of 16.
    tensors = {tensor.name: tensor for tensor in onnx.load("recognizer_int8.onnx").graph.initializer}
    assert {tensor.dims[-1] % 16 for name, tensor in tensors.items() if name.endswith("_quantized")} == {0}
    assert any(
        list(tensor.dims) == [16, 20] and tensor.data_type == onnx.TensorProto.FLOAT for tensor in tensors.values()
    )
    assert json.loads((tmp_path / "recognizer.onnx.verification.json").read_text())["largest_difference_alone"] < 1e-4
