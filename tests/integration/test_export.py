"""Exports compute what fairseq computes.

The reference is fairseq's own HubertModel with random weights, those of the norms included; this
package's student takes part in the tests of the script only. The waveforms are noise and sweeps: only
the arithmetic is compared.
"""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import LINKED, S3PRL_FITS, TINY, stock_hubert
from documented import blocks
from omegaconf import OmegaConf
from packaging.version import Version
from training import composed
from transformers import HubertModel, Wav2Vec2FeatureExtractor

import fairseq_stack
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.errors import InputError
from fairseq_stack.export.card import model_card
from fairseq_stack.export.fairseq import export_fairseq
from fairseq_stack.export.formats import HIDDEN_STATES
from fairseq_stack.export.huggingface import export_huggingface, load_huggingface
from fairseq_stack.export.onnx import export_onnx
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.s3prl import export_s3prl
from fairseq_stack.export.student import FORMATS
from fairseq_stack.export.verify import (
    SHARES,
    TOLERANCE,
    ExportMismatch,
    padded_batch,
    verification_speech,
    write_verified,
)
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig

ROOT = Path(__file__).parents[2]
CONV_LAYERS = parse_conv_layers(TINY["conv_feature_layers"])

# Seats in use at each stage of 12 layers in 4 stages: A1 B1 C1, then A1 A2 B1 B2 C1 C2, and so on.
SEATS = {
    0: [0, 4, 8],
    1: [0, 1, 4, 5, 8, 9],
    2: [0, 1, 2, 4, 5, 6, 8, 9, 10],
    3: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
}
BASE = {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": False}
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
OTHER_ACTIVATIONS = ("gelu_accurate", "gelu_fast", "relu", "tanh", "linear")
DISTILHUBERT = {"feature_layer_norm": False, "intermediate_style": "prediction"}
FORMATS_HERE = [format for format in FORMATS if S3PRL_FITS or not format.startswith("s3prl")]
OTHER_FORMATS = [format for format in FORMATS_HERE if format != "s3prl-distiller"]
LENGTHS = (400, 7_777, 16_000, 16_080)  # samples; 1, 24, 49 and 50 frames


def hubert_and_state(shape, stage, normalize):
    """fairseq's HubertModel of one stage, and what fairseq would save for a student with its weights.

    Layers that the stage does not use hold NaN in the student: they must not matter.
    """
    model, cfg = stock_hubert(normalize=normalize, **{**TINY, **shape})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    weights = model.state_dict()
    for name in [name for name in weights if name.startswith(("mask_emb", "final_proj", "label_embs"))]:
        del weights[name]
    for name in weights:
        if name.startswith("encoder.layers.") and int(name.split(".")[2]) not in SEATS[stage]:
            weights[name] = torch.full_like(weights[name], float("nan"))
    weights.update({"heads.12.weight": torch.zeros(4, 16), "heads.12.bias": torch.zeros(4)})
    weights["stage"] = torch.tensor(float(stage))
    cfg["model"].update(_name="stacked_hubert", stack_method="interleaved", stack_stages=4)
    model.encoder.layers = torch.nn.ModuleList(model.encoder.layers[seat] for seat in SEATS[stage])
    return model, {"model": weights, "cfg": cfg}


@torch.no_grad()
def fairseq_hidden_states(model, waveform, normalize, epsilon=1e-5):
    """Hidden states 0 to D of one waveform [S], the last one behind the final norm of a pre-norm encoder."""
    source = (F.layer_norm(waveform, waveform.shape, eps=epsilon) if normalize else waveform)[None]
    inputs = []
    hook = model.encoder.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    depth = len(model.encoder.layers)
    states = [model.extract_features(source, output_layer=layer)[0] for layer in (*range(1, depth), None)]
    hook.remove()
    frames = states[0].size(1)  # fairseq pads the layers' input to an even number of frames
    return [inputs[0].transpose(0, 1)[:, :frames], *states]


def waveform(length):
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length))


def difference(states, others):
    assert [state.shape for state in states] == [state.shape for state in others]
    return max((state - other).abs().max().item() for state, other in zip(states, others))


@pytest.mark.parametrize(
    "shape, normalize, stage",
    [
        (BASE, False, 0),
        (BASE, False, 1),
        (BASE, False, 2),
        (BASE, False, 3),
        (BASE, True, 3),
        (LARGE, True, 1),
        (LARGE, True, 3),
        (LARGE, False, 3),
        ({**BASE, "layer_norm_first": True}, False, 0),
        ({**LARGE, "layer_norm_first": False}, True, 0),
        ({**BASE, "encoder_embed_dim": 8}, False, 0),  # as wide as the CNN, so without a projection
        *(({**BASE, "activation_fn": name}, False, 0) for name in OTHER_ACTIVATIONS),
    ],
)
def test_every_hidden_state_of_an_utterance_equals_fairseqs(tmp_path, shape, normalize, stage):
    model, state = hubert_and_state(shape, stage, normalize)
    student = student_from_checkpoint(state)
    export_huggingface(student, tmp_path / "huggingface")

    in_transformers, report = HubertModel.from_pretrained(tmp_path / "huggingface", output_loading_info=True)
    assert not any(report.values()), report

    for length in LENGTHS:
        source = waveform(length)
        expected = fairseq_hidden_states(model, source, normalize)
        assert len(expected) == len(SEATS[stage]) + 1
        inputs = F.layer_norm(source, source.shape) if normalize else source
        with torch.no_grad():
            output = in_transformers(inputs[None], output_hidden_states=True)
            assert difference(output.hidden_states, expected) < TOLERANCE
            assert difference([output.last_hidden_state], expected[-1:]) < TOLERANCE
            assert difference(PlainStudent(student)(source[None], torch.tensor([length]))[0], expected) < TOLERANCE


@pytest.mark.s3prl
@pytest.mark.parametrize(
    "shape", [BASE, LARGE, {**BASE, "layer_norm_first": True}, {**LARGE, "layer_norm_first": False}]
)
@pytest.mark.parametrize("normalize, stage", [(False, 0), (True, 1), (False, 3)])
def test_every_hidden_state_in_s3prls_hubert_equals_fairseqs(tmp_path, shape, normalize, stage):
    import s3prl.hub

    model, state = hubert_and_state(shape, stage, normalize)
    export_s3prl(student_from_checkpoint(state), tmp_path / "s3prl.pt")
    upstream = s3prl.hub.hubert_custom(ckpt=str(tmp_path / "s3prl.pt")).eval()
    assert type(upstream) is type(s3prl.hub.hubert_local(ckpt=str(tmp_path / "s3prl.pt")))
    for length in LENGTHS:
        with torch.no_grad():
            states = upstream([waveform(length)])["hidden_states"]
        assert difference(states, fairseq_hidden_states(model, waveform(length), normalize)) < TOLERANCE


@pytest.mark.parametrize("shape, normalize, stage", [(BASE, False, 1), (LARGE, True, 3)], ids=["base", "large"])
def test_fairseqs_own_fine_tuning_starts_from_the_fairseq_export(tmp_path, shape, normalize, stage):
    from fairseq.checkpoint_utils import load_model_ensemble_and_task
    from fairseq.data import Dictionary
    from fairseq.models import build_model

    fairseq_stack.register()  # as common.user_dir does
    model, state = hubert_and_state(shape, stage, normalize)
    state["model"]["mask_emb"] = torch.randn(TINY["encoder_embed_dim"])
    export_fairseq(student_from_checkpoint(state), tmp_path / "student.pt")
    (loaded,), _, task = load_model_ensemble_and_task([str(tmp_path / "student.pt")], strict=True)
    assert torch.equal(loaded.mask_emb, state["model"]["mask_emb"]) and task.cfg.normalize is normalize

    letters = Dictionary()
    letters.add_symbol("a")
    cfg = {"_name": "hubert_ctc", "w2v_path": str(tmp_path / "student.pt"), "mask_prob": 0.3, "layerdrop": 0.1}
    cfg = OmegaConf.create({"model": cfg, "task": {"normalize": normalize, "data": str(tmp_path)}})
    ctc = build_model(cfg.model, SimpleNamespace(target_dictionary=letters))
    tuned = ctc.w2v_encoder.w2v_model
    assert tuned.mask_prob == 0.3 and tuned.encoder.layerdrop == 0.1  # the recipe's, not the export's
    ctc.eval()
    source = waveform(16_080)
    inputs = F.layer_norm(source, source.shape) if normalize else source
    with torch.no_grad():
        features, _ = tuned.extract_features(inputs[None], padding_mask=torch.zeros(1, 16_080, dtype=torch.bool))
        logits = ctc(source=inputs[None], padding_mask=torch.zeros(1, 16_080, dtype=torch.bool))["encoder_out"]
    assert difference([features], fairseq_hidden_states(model, source, normalize)[-1:]) < TOLERANCE
    assert logits.shape == (50, 1, len(letters))


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_plain_forward_pass_equals_the_training_model_in_a_padded_batch(tmp_path, speech, shape, normalize):
    state = load_checkpoint(student_file(tmp_path, speech, 2, **shape))
    state["cfg"]["task"]["normalize"] = normalize
    student, waveforms = student_from_checkpoint(state), [waveform(length) for length in LENGTHS]
    with torch.no_grad():
        trained = StackedHubert.from_checkpoint(state)(*padded_batch(waveforms, 1e-5 if normalize else None))
        states, frames = PlainStudent(student)(*padded_batch(waveforms))
        heads = PlainStudent(student).outputs(*padded_batch(waveforms))
    assert frames.tolist() == trained["frames"].tolist() == [1, 24, 49, 50]
    for row, count in enumerate(frames):
        expected = [state[row, :count] for state in trained["hidden_states"]]
        assert difference([state[row, :count] for state in states], expected) < TOLERANCE
        assert difference([heads["head 12"][row, :count]], [trained["predictions"][12][row, :count]]) < TOLERANCE


def levels():
    """Waveforms [S] from the level of a whisper far away to full scale, one with an offset."""
    short, middle, long = map(waveform, LENGTHS[1:])  # s3prl's frozen upstreams pad what is shorter than 0.05 s
    return [0.01 * short, 0.07 * middle, 0.01 * long + 0.1, short, middle, 2 * long]


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_a_student_that_normalised_as_transformers_does_agrees_there_at_every_level(tmp_path, shape):
    model, state = hubert_and_state(shape, 1, True)
    state["cfg"]["task"]["normalize_epsilon"] = 1e-7
    student = student_from_checkpoint(state)
    export_huggingface(student, tmp_path)
    loaded = FORMATS["huggingface"].load(tmp_path, student=student)
    upstreams = [lambda source: loaded([source]).values()]
    if S3PRL_FITS:
        import s3prl.hub

        from fairseq_stack.evaluation.upstreams import load_export

        s3prls, evaluated = s3prl.hub.hf_hubert_custom(str(tmp_path)).eval(), load_export(tmp_path)
        upstreams.append(lambda source: s3prls([source])["hidden_states"])
        upstreams.append(lambda source: evaluated(source[None], torch.tensor([len(source)]))[0])
    for source in levels():
        expected = fairseq_hidden_states(model, source, True, 1e-7)
        for upstream in upstreams:
            with torch.no_grad():
                states = [state[:, : expected[0].size(1)] for state in upstream(source)]  # s3prl repeats the last frame
            assert difference(states, expected) < TOLERANCE


@pytest.mark.s3prl
@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_s3prl_loads_the_huggingface_export_with_its_preprocessing(tmp_path, shape):
    import s3prl.hub

    model, state = hubert_and_state(shape, 1, False)
    export_huggingface(student_from_checkpoint(state), tmp_path)
    upstream = s3prl.hub.hf_hubert_custom(str(tmp_path)).eval()
    assert upstream.extracter.do_normalize is False
    for length in LENGTHS:
        with torch.no_grad():
            states = upstream([waveform(length)])["hidden_states"]
        assert difference(states, fairseq_hidden_states(model, waveform(length), False)) < TOLERANCE


def test_padding_changes_nothing_in_transformers_unless_a_group_norm_sees_it(tmp_path):
    lengths = (7_777, 16_000, 12_345)
    model, state = hubert_and_state(LARGE, 1, False)
    export_huggingface(student_from_checkpoint(state), tmp_path)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    waveforms = [waveform(length).numpy() for length in lengths]
    batch = extractor(waveforms, padding=True, return_tensors="pt", sampling_rate=16_000)
    with torch.no_grad():
        states = HubertModel.from_pretrained(tmp_path)(**batch, output_hidden_states=True).hidden_states
    for row, length in enumerate(lengths):
        expected = fairseq_hidden_states(model, waveform(length), False)
        frames = expected[0].size(1)
        assert difference([state[row : row + 1, :frames] for state in states], expected) < TOLERANCE


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("normalize", [False, True])
def test_onnxruntime_computes_batches_of_any_size_and_length_as_if_alone(tmp_path, shape, normalize):
    model, state = hubert_and_state(shape, 1, normalize)
    export_onnx(student_from_checkpoint(state), tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    for lengths in ([400], [16_000, 7_777], [12_345, 16_080, 401]):
        inputs, _ = padded_batch([waveform(length) for length in lengths])
        *states, frames = session.run(None, {"waveforms": inputs.numpy(), "lengths": np.array(lengths)})
        for row, length in enumerate(lengths):
            expected = fairseq_hidden_states(model, waveform(length), normalize)
            assert frames[row] == expected[0].size(1)
            ours = [torch.from_numpy(state[row : row + 1, : frames[row]]) for state in states]
            assert difference(ours, expected) < TOLERANCE


@pytest.mark.parametrize("shape, normalize", [(BASE, False), (LARGE, True)], ids=["base", "large"])
def test_onnxruntime_loses_no_digits_over_a_minute_with_an_offset(tmp_path, shape, normalize):
    model, state = hubert_and_state(shape, 0, normalize)
    export_onnx(student_from_checkpoint(state), tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    model.double()
    for seconds, level, offset in ((60, 0.01, 0.1), (20, 1, 0)):
        source = level * waveform(seconds * 16_000) + offset
        *states, _ = session.run(None, {"waveforms": source[None].numpy(), "lengths": np.array([len(source)])})
        expected = fairseq_hidden_states(model, source.double(), normalize)
        assert difference([torch.from_numpy(state) for state in states], expected) < TOLERANCE


def test_attention_in_onnx_has_a_loop_over_blocks_of_queries(tmp_path):
    _, state = hubert_and_state(BASE, 0, False)
    export_onnx(student_from_checkpoint(state), tmp_path / "student.onnx")
    nodes = onnx.load(tmp_path / "student.onnx").graph.node
    loops = [node for node in nodes if node.op_type == "Loop"]
    assert len(loops) == 3 and not any(node.op_type == "Softmax" for node in nodes)
    for loop in loops:
        assert [node.op_type for node in loop.attribute[0].g.node].count("Softmax") == 1


@pytest.mark.parametrize("precision, shape", [("fp16", BASE), ("fp16", LARGE), ("int8", BASE)])
def test_a_lower_precision_makes_the_file_smaller_and_is_verified(tmp_path, speech, export_student, precision, shape):
    # Wide enough that the weights outweigh the graph.
    checkpoint = student_file(tmp_path, speech, 1, encoder_embed_dim=96, encoder_ffn_embed_dim=384, **shape)
    files = {name: tmp_path / f"{name}.onnx" for name in ("fp32", precision)}
    for name, file in files.items():
        error, output = export_student(checkpoint, "--to", "onnx", "--output", file, "--precision", name)
        assert error is None
    assert "(mean square difference, as a share of the variance)" in output
    proof = json.loads((tmp_path / f"{precision}.onnx.verification.json").read_text())
    assert 0 < proof["largest_difference_alone"] <= SHARES[precision] and proof["precision"] == precision
    ratio = files[precision].stat().st_size / files["fp32"].stat().st_size
    assert ratio < {"fp16": 0.7, "int8": 0.5}[precision]
    model = onnx.load(files[precision])
    assert all(tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for tensor in model.graph.output[:-1])
    kinds = {node.op_type for node in model.graph.node}
    # Each of 3 layers has six products with weights; the projection behind the CNN is another.
    assert precision != "int8" or sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 3 * 6 + 1
    assert "ConvInteger" not in kinds and "Conv" in kinds


def test_int8_that_would_quantise_nothing_is_refused(tmp_path, speech, export_student):
    checkpoint = student_file(tmp_path, speech, 1, encoder_embed_dim=24, encoder_ffn_embed_dim=40)
    error, _ = export_student(checkpoint, "--to", "onnx", "--precision", "int8", "--output", tmp_path / "student.onnx")
    assert "--precision int8: none of the student's widths (24, 40) is a multiple of 16" in str(error)
    assert not list(tmp_path.glob("*.onnx*"))


def test_a_wrong_scale_in_int8_leaves_no_file(tmp_path, speech, export_student, monkeypatch):
    from fairseq_stack.export import onnx as module

    quantise = module._quantise

    def wrong(file):
        quantise(file)
        model = onnx.load(file)
        scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale"))
        scale.CopyFrom(onnx.numpy_helper.from_array(1.3 * onnx.numpy_helper.to_array(scale), scale.name))
        onnx.save(model, file)

    monkeypatch.setattr(module, "_quantise", wrong)
    checkpoint = student_file(tmp_path, speech, 1)
    error, _ = export_student(checkpoint, "--to", "onnx", "--precision", "int8", "--output", tmp_path / "student.onnx")
    assert "more than 0.01 of their variance; export it with --precision fp32" in error
    assert not (tmp_path / "student.onnx").exists()


def test_a_file_computes_the_hidden_states_that_are_asked_for_and_no_others(tmp_path, speech, export_student):
    checkpoint = student_file(tmp_path, speech, 1)
    inputs, lengths = padded_batch([waveform(8_000), waveform(4_000)])
    inputs = {"waveforms": inputs.numpy(), "lengths": lengths.numpy()}
    found = {}
    for states in HIDDEN_STATES:
        file = tmp_path / f"{states}.onnx"
        options = ["--to", "onnx", "--hidden-states", states, "--output", file]
        assert export_student(checkpoint, *options)[0] is None
        session = onnxruntime.InferenceSession(str(file))
        weights = {"layer_weights": np.array([0.1, 0.2, 0.7, 0.0], np.float32)} if states == "weighted" else {}
        names = [output.name for output in session.get_outputs()]
        found[states] = dict(zip(names, session.run(None, {**inputs, **weights})))
        assert session.get_modelmeta().custom_metadata_map["hidden_states"] == states
    assert list(found["all"]) == [*(f"hidden_state_{number}" for number in range(4)), "frames"]
    assert list(found["last"]) == ["hidden_state_3", "frames"] and list(found["weighted"]) == ["weighted_sum", "frames"]
    assert np.allclose(found["last"]["hidden_state_3"], found["all"]["hidden_state_3"], atol=1e-5)
    expected = sum(weight * found["all"][f"hidden_state_{number}"] for number, weight in enumerate((0.1, 0.2, 0.7)))
    assert np.allclose(found["weighted"]["weighted_sum"], expected, atol=1e-5)
    proof = json.loads((tmp_path / "weighted.onnx.verification.json").read_text())
    assert list(proof["padded_batch"]["difference"]) == ["weighted sum"]


def test_the_example_without_torch_gives_each_recordings_features(tmp_path, monkeypatch):
    _, state = hubert_and_state(BASE, 0, False)
    student = student_from_checkpoint(state)
    export_onnx(student, tmp_path / "student.onnx")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks("docs/export.md", "python")[0], names)
    assert not any(type(value).__module__.startswith("torch") for value in names.values())
    for recording, features in zip(names["recordings"], names["features"]):
        source = torch.from_numpy(recording).float()
        expected = PlainStudent(student)(source[None], torch.tensor([len(source)]))[0][-1]
        assert difference([torch.from_numpy(features)[None]], [expected]) < TOLERANCE


def test_options_that_a_format_does_not_have_are_refused(tmp_path, speech, export_student):
    checkpoint = student_file(tmp_path, speech, 1)
    for to, option, value, words in (
        ("s3prl", "--precision", "int8", "--precision int8: --to s3prl has no such choice; export with --to onnx"),
        ("onnx", "--hidden-states", "first", "--hidden-states=first is unknown; choose from all, last, weighted"),
    ):
        error, _ = export_student(checkpoint, "--to", to, option, value, "--output", tmp_path / "target")
        assert error == f"error: {words}"


@pytest.mark.parametrize("format", ["s3prl", "s3prl-distiller", "fairseq"])
def test_files_hold_tensors_and_plain_values(tmp_path, speech, format):
    shape = DISTILHUBERT if format == "s3prl-distiller" else {}
    student = student_from_checkpoint(load_checkpoint(student_file(tmp_path, speech, 1, **shape)))
    FORMATS[format].write(student, tmp_path / "export")
    assert isinstance(torch.load(tmp_path / "export", weights_only=True), dict)


def test_what_the_other_library_cannot_compute_is_refused(tmp_path):
    _, state = hubert_and_state(BASE, 0, False)
    state["cfg"]["model"]["activation_fn"] = "relu_squared"
    with pytest.raises(InputError, match="activation_fn=relu_squared"):
        export_huggingface(student_from_checkpoint(state), tmp_path / "huggingface")
    _, state = hubert_and_state({"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 3"}, 0, False)
    with pytest.raises(InputError, match="40 samples.*320"):
        export_s3prl(student_from_checkpoint(state), tmp_path / "s3prl.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.5, float("nan")])
@pytest.mark.parametrize("format", OTHER_FORMATS)
def test_an_export_that_computes_something_else_leaves_nothing(tmp_path, format, value):
    model, state = hubert_and_state(BASE, 0, False)
    state["model"]["encoder.layers.4.fc2.bias"] = torch.full((16,), value)
    student = student_from_checkpoint(state)

    def reference(waveforms):
        states = zip(*(fairseq_hidden_states(model, source, False) for source in waveforms))
        return {number: torch.cat(rows) for number, rows in enumerate(states)}

    with pytest.raises(ExportMismatch, match="not written"):
        write_verified(
            partial(FORMATS[format].write, student),
            partial(FORMATS[format].load, student=student),
            reference,
            [waveform(8_000)],
            CONV_LAYERS,
            tmp_path / "export",
            padding="none",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offset, error, written", [(0.0, 5e-4, False), (0.1, 5e-4, True), (0.1, 5e-3, False)])
def test_the_digits_that_a_group_norm_loses_to_an_offset_are_no_mismatch(tmp_path, offset, error, written):
    _, state = hubert_and_state(BASE, 0, False)
    student = student_from_checkpoint(state)
    exported = PlainStudent(student)

    def reference(waveforms):
        with torch.no_grad():
            states, _ = exported(*padded_batch(waveforms))
        return {number: state + error for number, state in enumerate(states)}

    def verified():
        return write_verified(
            partial(export_huggingface, student),
            partial(FORMATS["huggingface"].load, student=student),
            reference,
            [0.1 * waveform(8_000) + offset],  # at a level of 0.01
            CONV_LAYERS,
            tmp_path / "export",
            padding="none",
        )

    if written:
        (one,) = verified()["alone"]
        assert one["tolerance"] == pytest.approx(10 * TOLERANCE, rel=0.05)
    else:
        with pytest.raises(ExportMismatch, match="not written"):
            verified()
    assert (tmp_path / "export").exists() is written


def test_excerpts_have_several_lengths_and_at_least_a_frame(speech):
    *excerpts, quiet, offset, loud, together = verification_speech(speech / "valid.tsv", CONV_LAYERS)
    lengths = [len(excerpt) for excerpt in excerpts]
    assert len(set(lengths)) == 8 and min(lengths) >= 400
    assert quiet.pow(2).mean().sqrt().item() == pytest.approx(0.001) and loud.abs().max() == 1
    assert offset.mean().item() == pytest.approx(0.1) and torch.allclose(offset - 0.1, 10 * quiet, atol=1e-7)
    samples = [int(line.split("\t")[1]) for line in (speech / "valid.tsv").read_text().splitlines()[1:]]
    assert len(together) == sum(samples)
    with pytest.raises(InputError, match="shorter than one frame"):
        verification_speech(speech / "valid.tsv", [(8, 160_000, 1)])


# The script, with this package's own student


def student_file(folder, speech, stage, teacher_layers=(4, 8, 12), **shape):
    """A checkpoint as fairseq saves it after some training, here none."""
    fields = {**TINY, **LINKED, **shape}
    cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), fields)
    torch.manual_seed(0)
    model = StackedHubert(cfg, {layer: 24 for layer in teacher_layers}, teacher_depth=12)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    model.grow_to(stage)
    model_cfg = {**OmegaConf.to_container(cfg, enum_to_str=True), "_name": "stacked_hubert"}
    task_cfg = {"_name": "speech_distillation", "data": str(speech), "normalize": False}
    average = {name: 0.5 * value for name, value in model.state_dict().items()}
    path = folder / "checkpoint_last.pt"
    torch.save(
        {
            "cfg": {"model": model_cfg, "task": task_cfg},
            "model": model.state_dict(),
            "optimizer_history": [{"num_updates": 1234}],
            "extra_state": {"best": 0.25, "ema": average},
        },
        path,
    )
    return path


@pytest.fixture
def export_student(capsys):
    """Run fairseq-stack export; returns its error (None or a line) and its standard output."""

    def run(*arguments):
        try:
            main(["export", *arguments])
        except SystemExit as exit:
            return exit.code, capsys.readouterr().out
        return None, capsys.readouterr().out

    return run


def test_the_command_works_without_fairseq_and_hydra_and_says_what_it_compared_with(tmp_path, speech):
    jobs = []
    for format in FORMATS_HERE:
        folder = tmp_path / f"{format} source"
        folder.mkdir()
        checkpoint = student_file(folder, speech, 2, **(DISTILHUBERT if format == "s3prl-distiller" else {}))
        jobs.append(["export", str(checkpoint), "--to", format, "--output", str(tmp_path / format)])
    jobs = [job for job in jobs if job[3] != "fairseq"]  # which is verified in fairseq
    code = (
        "import sys; sys.modules.update(fairseq=None, hydra=None)\n"
        "from fairseq_stack.cli import main\n"
        f"for job in {jobs}: main(job)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "largest difference to the same weights in plain PyTorch (fairseq is not installed)"
    assert done.stdout.count(said) == len(jobs) >= 2 and all(Path(job[5]).exists() for job in jobs)


def test_a_transformers_that_leaves_out_the_final_norm_is_named_and_its_last_hidden_state_is_right(
    tmp_path, speech, caplog
):
    student = student_from_checkpoint(load_checkpoint(student_file(tmp_path, speech, 2, **LARGE)))
    export_huggingface(student, tmp_path / "huggingface")
    expected = load_huggingface(tmp_path / "huggingface", student)([waveform(8000)])
    config = tmp_path / "huggingface/config.json"
    fields = json.loads(config.read_text())
    del fields["tie_last_hidden_states"]  # which transformers 5.0 to 5.17 do not read
    config.write_text(json.dumps(fields))
    found = load_huggingface(tmp_path / "huggingface", student)([waveform(8000)])
    assert difference(list(found.values()), list(expected.values())) == 0
    left_out = "leaves the final layer norm out of hidden_states[-1]; last_hidden_state has it"
    assert (left_out in caplog.text) is (Version("5") <= Version(transformers.__version__))


@pytest.mark.parametrize("stage, depth", [(2, 6), (4, 12)])
@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_the_script_exports_a_student_at_any_stage_and_stores_the_proof(
    tmp_path, speech, export_student, shape, stage, depth
):
    checkpoint = student_file(tmp_path, speech, stage, **shape)
    for format in OTHER_FORMATS:
        error, output = export_student(checkpoint, "--to", format, "--output", tmp_path / format)
        assert error is None
        *rows, summary, padding = output.splitlines()
        header = rows[0].strip("| ").split()[::2]
        assert header == ["samples", "level", "offset", *map(str, range(depth + 1))] and len(rows) == 15
        assert summary.startswith(f"{format}: {tmp_path / format}, largest difference to the training model")
        folder = tmp_path / format / "verification.json"
        proof = json.loads((folder if folder.exists() else tmp_path / f"{format}.verification.json").read_text())
        assert proof["largest_difference_alone"] <= TOLERANCE and padding == f"padding: {proof['padding']}"
        # In a padded batch the differences are what the line about padding says.
        agrees = proof["largest_difference_padded"] <= TOLERANCE
        assert agrees is (FORMATS[format].padding(student_from_checkpoint(load_checkpoint(checkpoint))) is None)
        assert [len(one["difference"]) for one in (*proof["alone"], proof["padded_batch"])] == [depth + 1] * 13
    assert HubertModel.from_pretrained(tmp_path / "huggingface").config.num_hidden_layers == depth


@pytest.mark.s3prl
@pytest.mark.parametrize(
    "shape, layers",
    [
        ({}, [4, 8, 12]),
        ({"head_inner_dim": 20}, [4, 8, 12]),
        ({"head_shared": True, "extractor_mode": "layer_norm"}, [4, 8, 12]),
        ({"encoder_embed_dim": 8}, [12]),  # as wide as the CNN, so without a projection
        ({"head_inner_dim": 20, "intermediate_style": "layer_to_layer"}, [12]),
    ],
)
def test_a_student_without_a_norm_behind_the_cnn_goes_to_s3prls_distiller_heads_included(
    tmp_path, speech, export_student, shape, layers
):
    import s3prl.hub

    checkpoint = student_file(tmp_path, speech, 2, layers, **{**DISTILHUBERT, **shape})
    for format in ("s3prl-distiller", "huggingface", "onnx"):
        assert export_student(checkpoint, "--to", format, "--output", tmp_path / format)[0] is None
    with torch.no_grad():
        upstream = s3prl.hub.distiller_local(ckpt=str(tmp_path / "s3prl-distiller")).eval()
        states = upstream([waveform(8_000)])["hidden_states"]
        trained = StackedHubert.from_checkpoint(load_checkpoint(checkpoint))
        expected = trained(*padded_batch([waveform(8_000)]))
    predictions = [expected["predictions"][layer] for layer in layers]
    assert difference(states[1:], expected["hidden_states"][1:] + predictions) < TOLERANCE
    proof = json.loads((tmp_path / "s3prl-distiller.verification.json").read_text())
    assert list(proof["padded_batch"]["difference"]) == [*map(str, range(1, 7)), *(f"head {n}" for n in layers)]
    assert (proof["largest_difference_padded"] <= TOLERANCE) is (shape.get("extractor_mode") == "layer_norm")


@pytest.mark.parametrize(
    "format, shape, words",
    [
        ("s3prl-distiller", {"feature_layer_norm": True}, "model.feature_layer_norm=true"),
        ("s3prl-distiller", {"conv_bias": True}, "model.conv_bias=true"),
        ("s3prl-distiller", {"layer_norm_first": True}, "model.layer_norm_first=true"),
        ("s3prl-distiller", {"intermediate_style": "layer_to_layer"}, "criterion.intermediate_style=layer_to_layer"),
        ("s3prl-distiller", {"loss": "temporal_gram", "teacher_layers": []}, "criterion.loss=temporal_gram"),
        ("s3prl-distiller", {"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 3"}, "model.conv_feature_layers="),
        ("s3prl", {}, "model.feature_layer_norm=false"),
        ("s3prl", {"layer_norm_first": True}, "model.feature_layer_norm=false"),
        ("s3prl", {"feature_layer_norm": True, "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 3"}, "model.conv_feat"),
        ("fairseq", {}, "model.feature_layer_norm=false"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused_with_the_field_and_formats_that_take_the_student(
    tmp_path, speech, export_student, format, shape, words
):
    checkpoint = student_file(tmp_path, speech, 2, **{**DISTILHUBERT, **shape})
    error, _ = export_student(checkpoint, "--to", format, "--output", tmp_path / "student")
    assert error.startswith(f"error: {words}") and "; export it with --to huggingface" in error
    assert "\n" not in error and [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    advised = error.split("export it with --to ")[1].split(" or ")
    student = student_from_checkpoint(load_checkpoint(checkpoint))
    for other in FORMATS:
        if other in advised:
            FORMATS[other].write(student, tmp_path / other)
        else:
            with pytest.raises(InputError):
                FORMATS[other].write(student, tmp_path / other)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_the_model_card_tells_how_the_student_was_made(tmp_path, speech, export_student, shape):
    export_student(student_file(tmp_path, speech, 2, **shape), "--to", "huggingface", "--output", tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    parameters = sum(p.numel() for p in HubertModel.from_pretrained(tmp_path / "student").parameters())
    for row in (
        f"| parameters | {parameters / 1e6:.2f} M |",
        "| growth | interleaved stacking in 4 stages, prop schedule; exported at 6 of 12 layers |",
        f"| data | {speech.name}: 24 recordings, 0.00 h |",
        "| updates | 1,234 |",
        "| best validation loss | 0.25 |",
    ):
        assert row in card
    assert str(speech) not in card and "2606.11766" in card and "None" not in card


def used_as_the_card_says(folder, waveform):
    """Run the Python examples of a model card on a waveform [S]; returns the hidden states of each."""
    found = []
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        if "s3prl" not in code or S3PRL_FITS:
            names = {"waveform": waveform.numpy(), "torch": torch}
            exec(code.replace("FOLDER", str(folder)), names)
            found.append([state.detach() for state in names["hidden_states"]])
    return found


@pytest.mark.parametrize("epsilon", [1e-7, 1e-5])
def test_the_card_and_the_verification_tell_what_its_examples_give(tmp_path, speech, export_student, epsilon):
    checkpoint = student_file(tmp_path, speech, 2, normalize=True, **LARGE)
    state = load_checkpoint(checkpoint)
    state["cfg"]["task"].update({"normalize": True, "normalize_epsilon": epsilon})
    torch.save(state, checkpoint)
    error, output = export_student(checkpoint, "--to", "huggingface", "--output", tmp_path / "student")
    assert error is None
    trained = StackedHubert.from_checkpoint(state)
    proof = json.loads((tmp_path / "student" / "verification.json").read_text())
    card = (tmp_path / "student" / "README.md").read_text()
    largest = 0
    for source in verification_speech(speech / "valid.tsv", CONV_LAYERS):
        with torch.no_grad():
            expected = trained(*padded_batch([source], epsilon))["hidden_states"]
        differences = [difference(states, expected) for states in used_as_the_card_says(tmp_path / "student", source)]
        assert max(differences) == pytest.approx(min(differences), abs=1e-6)
        largest = max(largest, *differences)
    assert proof["largest_difference_alone"] == pytest.approx(largest, rel=0.01, abs=1e-6)
    assert f"by at most {proof['largest_difference_alone']:.2g}" in card
    assert "`last_hidden_state` has it" in card  # a pre-norm student
    assert (largest <= TOLERANCE) is (epsilon == 1e-7) is ("normalization" not in proof)
    if epsilon == 1e-5:
        assert largest > 0.1 and "transformers adds 1e-07 to the variance" in card and "normalisation: transf" in output
        assert proof["largest_difference_normalized_alike"] <= TOLERANCE
        # What the card gives for such a student, on the quiet recording.
        quiet = verification_speech(speech / "valid.tsv", CONV_LAYERS)[-4]
        call = re.search(r"`(torch\.nn\.functional\.layer_norm\(.*?\[None\])`", card)[1]
        inputs = eval(call, {"waveform": quiet.numpy(), "torch": torch})
        with torch.no_grad():
            states = HubertModel.from_pretrained(tmp_path / "student")(inputs, output_hidden_states=True).hidden_states
            assert difference(states, trained(*padded_batch([quiet], 1e-5))["hidden_states"]) < TOLERANCE


@pytest.mark.parametrize("format", [format for format in FORMATS_HERE if format in ("fairseq", "s3prl", "onnx")])
def test_the_verification_says_where_a_library_normalises_in_another_way(tmp_path, speech, export_student, format):
    checkpoint = student_file(tmp_path, speech, 2, normalize=True, **LARGE)
    for epsilon in (1e-7, 1e-5):
        state = load_checkpoint(checkpoint)
        state["cfg"]["task"].update({"normalize": True, "normalize_epsilon": epsilon})
        torch.save(state, checkpoint)
        assert export_student(checkpoint, "--to", format, "--output", tmp_path / format, "--force")[0] is None
        proof = json.loads((tmp_path / f"{format}.verification.json").read_text())
        exact = format == "onnx" or epsilon == 1e-5
        assert (proof["largest_difference_alone"] <= TOLERANCE) is exact is ("normalization" not in proof)
        assert {(0.001, 0.0), (0.01, 0.1)} <= {(one["level"], round(one["offset"], 4)) for one in proof["alone"]}


def test_the_mask_embedding_goes_along_and_masks_as_in_training(tmp_path, speech, export_student):
    from fairseq.checkpoint_utils import load_model_ensemble_and_task

    checkpoint = student_file(tmp_path, speech, 2, mask_prob=0.65, **LARGE)
    for format in ("huggingface", "fairseq"):
        assert export_student(checkpoint, "--to", format, "--output", tmp_path / format)[0] is None
    trained = StackedHubert.from_checkpoint(load_checkpoint(checkpoint))
    in_transformers, report = HubertModel.from_pretrained(tmp_path / "huggingface", output_loading_info=True)
    assert not any(report.values()) and in_transformers.config.mask_time_prob == 0.05
    (in_fairseq,), _, _ = load_model_ensemble_and_task([str(tmp_path / "fairseq")])
    assert torch.equal(in_fairseq.mask_emb, trained.mask_emb)

    source, mask = waveform(16_000), torch.arange(49)[None] % 7 < 3
    with torch.no_grad():
        expected = trained(*padded_batch([source]), mask=mask)["hidden_states"]
        states = in_transformers(source[None], mask_time_indices=mask, output_hidden_states=True).hidden_states
    assert difference(states, expected) < TOLERANCE
    assert difference(states[:1], trained(*padded_batch([source]))["hidden_states"][:1]) > 0.1
    assert "mask embedding of the distillation" in (tmp_path / "huggingface/README.md").read_text()

    # Of a student without masks there is nothing to hand over, and fine-tuning may start one.
    checkpoint = student_file(tmp_path, speech, 2, **LARGE)
    assert export_student(checkpoint, "--to", "huggingface", "--output", tmp_path / "unmasked")[0] is None
    assert "there is no mask embedding" in (tmp_path / "unmasked/README.md").read_text()
    assert HubertModel.from_pretrained(tmp_path / "unmasked").config.mask_time_prob == 0
    masking = HubertModel.from_pretrained(tmp_path / "unmasked", mask_time_prob=0.05)
    assert 0 <= masking.masked_spec_embed.min() < masking.masked_spec_embed.max() <= 1


def test_the_model_card_tells_the_papers_recipe():
    cfg = OmegaConf.to_container(
        composed("librispeech_base", ["task.data=manifests/ls960", "task.teacher=t/hubert.pt"])
    )
    shape = SimpleNamespace(config={**cfg["model"], "encoder_layers": 12}, depth=12, weights={}, normalize=False,
                            mask_emb=None, conv_layers=parse_conv_layers(StackedHubertConfig.conv_feature_layers))  # fmt: skip
    cfg["distributed_training"]["distributed_world_size"] = 4
    cfg["dataset"]["batch_size"] = 16
    proof = {
        "alone": [{"samples": 400, "level": 0.1}],
        "largest_difference_alone": 0.0,
        "padding": "",
        "compared_with": "",
    }
    card = model_card(shape, {"cfg": cfg}, proof)
    for row in (
        "| teacher | hubert.pt |",
        "| data | ls960 |",
        "| optimiser | adamw, learning rate 0.0005, weight decay 0.0001, polynomial decay, 23,074 updates of warm-up |",
        "| batch | up to 64 utterances |",
        "| precision | fp16 |",
    ):
        assert row in card


def test_the_moving_average_is_exported_if_asked_for_and_there(tmp_path, speech, export_student):
    checkpoint, target = student_file(tmp_path, speech, 2), tmp_path / "student.pt"
    assert export_student(checkpoint, "--to", "fairseq", "--output", target, "--ema")[0] is None
    trained = student_from_checkpoint(load_checkpoint(checkpoint)).weights
    exported = torch.load(target, weights_only=True)["model"]
    assert all(torch.equal(exported[name], 0.5 * weight) for name, weight in trained.items())

    state = load_checkpoint(checkpoint)
    del state["extra_state"]["ema"]
    torch.save(state, checkpoint)
    error, _ = export_student(checkpoint, "--to", "s3prl", "--output", tmp_path / "other.pt", "--ema")
    assert error.startswith(f"error: {checkpoint} has no moving average") and "\n" not in error


@pytest.mark.parametrize("format", FORMATS)
def test_the_script_leaves_an_existing_target_as_it_is(tmp_path, speech, export_student, format):
    checkpoint, target = student_file(tmp_path, speech, 1), tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("mine")
    error, _ = export_student(checkpoint, "--to", format, "--output", target)
    assert error == f"error: {target} exists; give --force to replace an export, or choose another --output"
    error, _ = export_student(checkpoint, "--to", format, "--output", target, "--force")
    assert error.startswith(f"error: {target} is no export")
    assert (target / "file").read_text() == "mine" and len(list(target.iterdir())) == 1


def test_a_file_may_replace_a_folder_by_force_and_the_other_way_round(tmp_path, speech, export_student):
    checkpoint, target = student_file(tmp_path, speech, 1), tmp_path / "out" / "target"
    target.parent.mkdir()
    for format, names in (
        ("fairseq", {"target", "target.verification.json"}),
        ("huggingface", {"target"}),
        ("fairseq", {"target", "target.verification.json"}),
    ):
        assert export_student(checkpoint, "--to", format, "--output", target, "--force")[0] is None
        assert {path.name for path in target.parent.iterdir()} == names


@pytest.mark.parametrize("format", FORMATS_HERE)
def test_an_export_is_replaced_by_force_once_verified_and_the_same_input_gives_the_same_bytes(
    tmp_path, speech, export_student, format
):
    shape = DISTILHUBERT if format == "s3prl-distiller" else {}
    checkpoint, target = student_file(tmp_path, speech, 1, **shape), tmp_path / "out" / "target"
    target.parent.mkdir()

    def content():
        return {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}

    assert export_student(checkpoint, "--to", format, "--output", target)[0] is None
    first = content()
    assert export_student(checkpoint, "--to", format, "--output", target, "--force")[0] is None
    assert content() == first

    broken = load_checkpoint(checkpoint)
    broken["model"]["encoder.layers.0.fc1.bias"] += float("nan")
    torch.save(broken, checkpoint)
    error, _ = export_student(checkpoint, "--to", format, "--output", target, "--force")
    assert "not written" in error and content() == first


def test_the_script_names_what_it_cannot_use(tmp_path, speech, teacher_file, export_student):
    checkpoint, target = student_file(tmp_path, tmp_path / "elsewhere", 1), tmp_path / "target"
    for arguments, words in (
        ([tmp_path / "none.pt"], f"{tmp_path / 'none.pt'} does not exist"),
        ([teacher_file], f"{teacher_file} holds a model named hubert"),
        ([checkpoint], f"{tmp_path / 'elsewhere' / 'valid.tsv'} does not exist; give --speech"),
        ([checkpoint, "--speech", checkpoint], f"{checkpoint}"),
    ):
        error, output = export_student(*arguments, "--to", "s3prl", "--output", target)
        assert error.startswith(f"error: {words}") and "\n" not in error and not output
    error, _ = export_student(checkpoint, "--to", "s3prl", "--output", tmp_path / "no" / "target")
    assert error.startswith(f"error: {tmp_path / 'no'} is not a folder")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
