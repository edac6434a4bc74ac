"""Teachers from files as their authors publish them, against the authors' own models.

The files are built here by the authors' code: the same names of weights, the same configurations in the same kinds of
objects, in tiny sizes with random weights. Where each layout comes from stands beside it.
"""

import argparse

import pytest
import torch
import torchaudio
from conftest import TINY, stock_hubert
from fairseq.data import Dictionary
from fairseq.models.hubert.hubert import HubertConfig
from omegaconf import OmegaConf
from test_checkpoint import student_state
from test_teachers import (
    CLOSE,
    POST_NORM,
    PRE_NORM,
    assert_states,
    fairseq_checkpoint,
    fairseq_states,
    shake,
    waveforms_of,
)
from torch import nn
from torchaudio.models.wav2vec2.components import LogitGenerator

from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.export.fairseq import export_fairseq
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.export.s3prl import export_s3prl
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.lazy import described_teacher
from fairseq_stack.teachers.torchaudio import BUCKET_DISTANCE, HEADS, STRIDES

LENGTHS = [400, 721, 4321, 9000]


def check(path, reference, depth=3):
    """Every hidden state of the teacher in `path` is the reference's, alone and in a padded batch."""
    waveforms = waveforms_of(LENGTHS)
    teacher = load_teacher(path)
    assert teacher.depth == depth
    assert_states(teacher, waveforms, [reference(waveform) for waveform in waveforms], range(depth + 1))
    return teacher


def states_in(layers, run, normalize=False, time_first=True):
    """A function from a waveform [S] to {layer: [T, D]}, by hooks on a model's layers.

    Args:
        layers: the model's.
        run: [1, S] to the model's final output, [1, T, D].
        normalize: whether the model wants normalised waveforms.
        time_first: whether its layers take [T, B, D], not [B, T, D].
    """

    def states(waveform):
        kept, hooks = {}, []
        for number, layer in enumerate(layers, start=1):
            hooks.append(layer.register_forward_hook(lambda *given, number=number: kept.update({number: given[2][0]})))
        hooks.append(layers[0].register_forward_pre_hook(lambda _, given: kept.update({0: given[0]})))
        given = nn.functional.layer_norm(waveform, waveform.shape) if normalize else waveform
        with torch.no_grad():
            final = run(given[None])[0]
        for hook in hooks:
            hook.remove()
        kept = {number: (state.transpose(0, 1) if time_first else state)[0] for number, state in kept.items()}
        return {number: state[: len(final)] for number, state in kept.items()} | {len(layers): final}

    return states


def of_fairseq(model, normalize):
    """fairseq's own HuBERT."""
    return states_in(model.encoder.layers, lambda waveforms: model.extract_features(waveforms)[0], normalize)


def shaken_hubert(shape, normalize=False):
    dictionary = Dictionary()
    dictionary.add_symbol("0")
    model, cfg = stock_hubert(normalize=normalize, dictionary=dictionary, **shape)
    return shake(model), cfg, dictionary


# fairseq: `save_checkpoint` of its Trainer, in the versions that the files were published with.


def namespace(cfg, **more):
    """The options as fairseq up to 0.10 keeps them: of model, task and training in one Namespace."""
    return argparse.Namespace(arch=cfg["model"]["_name"], **{**cfg["model"], **cfg["task"], **more})


def around(**content):
    """What stands beside the model in a checkpoint."""
    history = [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 1}]
    return {"args": None, "optimizer_history": history, "extra_state": {"epoch": 1}, "task_state": {}, **content}


def wav2vec2_parts(folder, kind):
    model, path, normalize = fairseq_checkpoint(folder, kind)
    return model, torch.load(path, weights_only=True)["cfg"], normalize


def hubert_xlarge(folder):
    """hubert_xtralarge_ll60k.pt: plain values, and the dictionary of the labels as an object."""
    model, cfg, dictionary = shaken_hubert(PRE_NORM, normalize=True)
    content = around(cfg=cfg, model=model.state_dict(), task_state={"dictionaries": [dictionary]})
    torch.save(content, folder / "file.pt")
    return of_fairseq(model, True)


def mhubert(folder):
    """mhubert_base_25hz.pt of fairseq's textless NLP: a batch norm before the positional convolution."""
    model, cfg, _ = shaken_hubert({**POST_NORM, "conv_pos_batch_norm": True})
    norm = model.encoder.pos_conv[0]
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2.0)
    torch.save(around(cfg=cfg, model=model.state_dict()), folder / "file.pt")
    return of_fairseq(model, False)


def wav2vec2_with_args(folder):
    """wav2vec_small.pt of 2020: a Namespace, no cfg, and torch's format before 1.6."""
    model, cfg, normalize = wav2vec2_parts(folder, "wav2vec2 base")
    content = around(args=namespace(cfg), model=model.state_dict())
    torch.save(content, folder / "file.pt", _use_new_zipfile_serialization=False)
    return lambda waveform: fairseq_states(model, waveform, normalize)


def xlsr_with_omegaconf(folder):
    """What fairseq wrote between the Namespace and plain dicts: omegaconf's objects, some of which name the arch."""
    model, cfg, normalize = wav2vec2_parts(folder, "wav2vec2 large")
    cfg["model"]["arch"] = cfg["model"].pop("_name")
    torch.save(around(cfg=OmegaConf.create(cfg), model=model.state_dict()), folder / "file.pt")
    return lambda waveform: fairseq_states(model, waveform, normalize)


def fine_tuned(weights):
    """fairseq's Wav2VecCtc and HubertCtc: the encoder without its pre-training parts, and a projection."""
    weights = {f"w2v_encoder.w2v_model.{key}": value for key, value in weights.items()}
    return {**weights, "w2v_encoder.proj.weight": torch.randn(5, 16), "w2v_encoder.proj.bias": torch.randn(5)}


def hubert_fine_tuned(folder):
    """hubert_large_ll60k_finetune_ls960.pt: the configuration of the pre-training in w2v_args."""
    model, cfg, dictionary = shaken_hubert(PRE_NORM, normalize=True)
    reference = of_fairseq(model, True)
    model.remove_pretraining_modules()
    outer = {
        "model": {"_name": "hubert_ctc", "w2v_path": "gone.pt", "w2v_args": cfg},
        "task": {"_name": "audio_finetuning", "normalize": True},
    }
    task_state = {"target_dictionary": dictionary}
    torch.save(around(cfg=outer, model=fine_tuned(model.state_dict()), task_state=task_state), folder / "file.pt")
    return reference


def hubert_fine_tuned_today(folder):
    """What fairseq's main branch saves: w2v_args is empty, and w2v_path names the pre-trained checkpoint."""
    reference = hubert_fine_tuned(folder)
    content = torch.load(folder / "file.pt", weights_only=False)
    model = content["cfg"]["model"]
    torch.save(around(cfg=model["w2v_args"], model={}), folder / "pretrained.pt")
    model.update(w2v_args=None, w2v_path=str(folder / "pretrained.pt"))
    torch.save(content, folder / "file.pt")
    return reference


def wav2vec2_fine_tuned_with_args(folder):
    """wav2vec_small_960h.pt: a Namespace in a Namespace."""
    model, cfg, normalize = wav2vec2_parts(folder, "wav2vec2 base")
    model.remove_pretraining_modules()
    args = argparse.Namespace(arch="wav2vec_ctc", w2v_path="gone.pt", normalize=normalize, w2v_args=namespace(cfg))
    content = around(args=args, model=fine_tuned(model.state_dict()))
    torch.save(content, folder / "file.pt", _use_new_zipfile_serialization=False)
    return lambda waveform: fairseq_states(model, waveform, normalize)


def data2vec_fine_tuned(folder):
    """audio_base_ls_960h.pt."""
    model, cfg, normalize = wav2vec2_parts(folder, "data2vec base")
    model.remove_pretraining_modules()
    task = {"_name": "audio_finetuning", "normalize": normalize}
    outer = {"model": {"_name": "wav2vec_ctc", "w2v_args": cfg}, "task": task}
    torch.save(around(cfg=outer, model=fine_tuned(model.state_dict())), folder / "file.pt")
    return lambda waveform: fairseq_states(model, waveform, normalize)


def contentvec(folder):
    """checkpoint_best_500.pt: HuBERT's encoder, and for its training a conditioned layer on top.

    github.com/auspicious3000/contentvec, contentvec/models: TransformerEncoder_1 and ContentvecModel. Its other file,
    checkpoint_best_legacy_500.pt, is one of fairseq's HuBERT.
    """
    model, cfg, dictionary = shaken_hubert(POST_NORM)
    weights = dict(model.state_dict())
    weights.update({key.replace("layers.2", "layers.3"): weights[key] for key in weights if "encoder.layers.2" in key})
    conditioned = ("layers.3.self_attn_layer_norm", "layers.3.final_layer_norm", "cond_layer_norm")
    for norm in (f"encoder.{name}" for name in conditioned):
        weights.update({f"{norm}.weight_ln.{part}": torch.randn(16, 4) for part in ("weight", "bias")})
    weights.update({"layer_proj.weight": torch.randn(8, 16), "layer_proj.bias": torch.randn(8)})
    cfg = {"model": {**cfg["model"], "_name": "contentvec", "encoder_layers_1": 1}, "task": cfg["task"]}
    torch.save(around(cfg=cfg, model=weights, task_state={"dictionaries": [dictionary]}), folder / "file.pt")
    return of_fairseq(model, False)


# Microsoft's WavLM: WavLM-Base.pt and its like, {"cfg": the fields of WavLMConfig, "model": ...}. s3prl has its code.


def wavlm(folder, shape, normalize, gated=True):
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    torch.manual_seed(0)
    bias = {"relative_position_embedding": gated, "gru_rel_pos": gated, "num_buckets": 320, "max_distance": 800}
    config = WavLMConfig({**shape, **bias, "normalize": normalize})
    model = shake(WavLM(config))
    torch.save({"cfg": vars(config), "model": model.state_dict()}, folder / "file.pt")
    return states_in(model.encoder.layers, lambda waveforms: model.extract_features(waveforms)[0], normalize)


def wavlm_base(folder):
    return wavlm(folder, POST_NORM, False)


def wavlm_large(folder):
    return wavlm(folder, PRE_NORM, True)


def unispeech_sat(folder):
    """UniSpeech-SAT-Large.pt, which s3prl runs by WavLM's code without the bias."""
    return wavlm(folder, PRE_NORM, True, gated=False)


# torchaudio.pipelines: a state dict. Of a bundle's sizes only the width is kept, which tells the number of heads.

BUNDLE = {
    "extractor_conv_layer_config": [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 3,
    "encoder_num_heads": 12,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}
GROUP = {"extractor_mode": "group_norm", "extractor_conv_bias": False, "encoder_layer_norm_first": False}
LAYER = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}


def bundle(folder, make, normalize, weights=lambda state: state, **options):
    torch.manual_seed(0)
    model = make(**BUNDLE, **options).eval()
    torch.save(weights(model.state_dict()), folder / "file.pt")
    model.aux = None
    layers = model.encoder.transformer.layers
    return states_in(layers, lambda waveforms: model(waveforms)[0], normalize, time_first=False)


def torchaudio_base_asr(folder):
    return bundle(folder, torchaudio.models.wav2vec2_model, False, aux_num_out=29, **GROUP)


def torchaudio_large(folder):
    """Of `bundle.get_model().state_dict()`, where the model is in a wrapper that normalises."""

    def wrapped(state):
        return {f"model.{key}": value for key, value in state.items()}

    return bundle(folder, torchaudio.models.wav2vec2_model, True, wrapped, aux_num_out=None, **LAYER)


def torchaudio_pretraining(folder):
    """Of hubert_pretrain_base, trained in several processes."""
    torch.manual_seed(0)
    student = torchaudio.models.wav2vec2_model(**BUNDLE, **GROUP, aux_num_out=None)
    logits = LogitGenerator(768, 5, 8, False, False)
    whole = torchaudio.models.HuBERTPretrainModel(student, nn.Identity(), logits, None).eval()
    torch.save({f"module.{key}": value for key, value in whole.state_dict().items()}, folder / "file.pt")
    return states_in(
        student.encoder.transformer.layers, lambda waveforms: student(waveforms)[0], False, time_first=False
    )


def torchaudio_wavlm(folder):
    gated = {"encoder_num_buckets": 320, "encoder_max_distance": 800}
    return bundle(folder, torchaudio.models.wavlm_model, False, aux_num_out=None, **GROUP, **gated)


def test_what_a_state_dict_does_not_say_is_true_of_every_bundle():
    bundles = [value for value in vars(torchaudio.pipelines).values() if hasattr(value, "_normalize_waveform")]
    assert len(bundles) > 20
    for bundle in bundles:
        layer_norms = bundle._params["extractor_mode"] == "layer_norm"
        assert bundle._normalize_waveform is bundle._params["encoder_layer_norm_first"] is layer_norms
        assert HEADS[bundle._params["encoder_embed_dim"]] == bundle._params["encoder_num_heads"]
        assert bundle._params.get("encoder_max_distance", BUCKET_DISTANCE) == BUCKET_DISTANCE
        _, kernels, strides = zip(*bundle._params["extractor_conv_layer_config"])
        assert STRIDES[kernels] == strides


# s3prl


def s3prl_converted(folder):
    """huggingface.co/s3prl/converted_ckpts: s3prl.upstream.wav2vec2.convert."""
    model, cfg, normalize = wav2vec2_parts(folder, "wav2vec2 large")
    content = {"task_cfg": cfg["task"], "model_cfg": cfg["model"], "model_weight": model.state_dict()}
    torch.save(content, folder / "file.pt")
    return lambda waveform: fairseq_states(model, waveform, normalize)


def distilhubert(folder):
    """distilhubert_ls960_4-8-12.ckpt, which s3prl's pretrain/runner.py saves."""
    from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

    torch.manual_seed(0)
    shape = {key: value for key, value in POST_NORM.items() if key != "conv_feature_layers"}
    shape["extractor_conv_feature_layers"] = POST_NORM["conv_feature_layers"]
    heads = {"n_tasks": 3, "pred_layer_id": [4, 8, 12], "final_dim": 16, "out_layer_inter_dim": 16}
    model = shake(DistillerModel(DistillerConfig({**shape, **heads})))
    args = argparse.Namespace(mode="train", seed=1337)
    content = {"Distiller": model.state_dict(), "Config": {"distiller": {**shape, **heads}}, "Args": args, "Step": 1}
    torch.save(content, folder / "file.pt")

    def run(waveforms):
        return model(waveforms, torch.ones_like(waveforms), get_hidden=True, no_pred=True)[4][-1]

    return states_in(model.encoder.layers, run)


FILES = {
    hubert_xlarge: "HuBERT",
    mhubert: "HuBERT",
    wav2vec2_with_args: "wav2vec 2.0",
    xlsr_with_omegaconf: "wav2vec 2.0",
    hubert_fine_tuned: "HuBERT",
    hubert_fine_tuned_today: "HuBERT",
    wav2vec2_fine_tuned_with_args: "wav2vec 2.0",
    data2vec_fine_tuned: "data2vec audio",
    contentvec: "ContentVec",
    torchaudio_base_asr: "HuBERT or wav2vec 2.0",
    torchaudio_large: "HuBERT or wav2vec 2.0",
    torchaudio_pretraining: "HuBERT or wav2vec 2.0",
    torchaudio_wavlm: "WavLM",
    s3prl_converted: "wav2vec 2.0",
    wavlm_base: "WavLM",
    wavlm_large: "WavLM",
    unispeech_sat: "UniSpeech-SAT",
    distilhubert: "DistilHuBERT",
}
NEED_S3PRL = (wavlm_base, wavlm_large, unispeech_sat, distilhubert)


@pytest.mark.parametrize("make", [pytest.param(m, marks=pytest.mark.s3prl) if m in NEED_S3PRL else m for m in FILES])
def test_every_hidden_state_is_the_authors(make, tmp_path):
    if make is mhubert and not hasattr(HubertConfig, "conv_pos_batch_norm"):
        pytest.skip("fairseq 0.12.2 does not have it")
    reference = make(tmp_path)
    assert check(tmp_path / "file.pt", reference).family == FILES[make]


@pytest.mark.parametrize("export", [None, export_fairseq, export_s3prl, export_huggingface])
def test_a_student_in_mid_growth_is_a_teacher_of_the_layers_in_use(export, tmp_path):
    state = student_state(stage=1)
    hubert, _ = stock_hubert(**{**TINY, "encoder_layers": 6})
    seats = [0, 1, 4, 5, 8, 9]  # A1 A2 B1 B2 C1 C2 of A1..A4 B1..B4 C1..C4

    def source(key):
        parts = key.split(".")
        parts[2:3] = [str(seats[int(parts[2])])] if key.startswith("encoder.layers.") else parts[2:3]
        return ".".join(parts)

    weights = state["model"]
    hubert.load_state_dict({key: weights.get(source(key), value) for key, value in hubert.state_dict().items()})
    path = tmp_path / "file.pt"
    if export is None:
        torch.save(state, path)
    else:
        export(student_from_checkpoint(state), path)
    teacher = check(path, of_fairseq(hubert, False), depth=6)
    assert teacher.family == ("student of fairseq_stack" if export is None else "HuBERT")


def test_a_student_hears_a_quiet_recording_as_in_its_training(tmp_path):
    state, path = student_state(stage=0), tmp_path / "file.pt"
    waveform, lengths = 1e-3 * waveforms_of([4000])[0], torch.tensor([4000])
    epsilon = 1e-7  # transformers', where fairseq's is 1e-5
    given = (waveform - waveform.mean()) / (waveform.var(unbiased=False) + epsilon).sqrt()
    torch.save(state, path)
    expected = load_teacher(path).hidden_states(given[None], lengths, range(4))
    state["cfg"]["task"].update(normalize=True, normalize_epsilon=epsilon)
    torch.save(state, path)
    torch.testing.assert_close(load_teacher(path).hidden_states(waveform[None], lengths, range(4)), expected, **CLOSE)


def test_a_store_knows_such_a_file_by_what_is_in_it(tmp_path):
    torchaudio_wavlm(tmp_path)
    first, folder = described_teacher(tmp_path / "file.pt", tmp_path / "store")
    again, same = described_teacher(tmp_path / "file.pt", tmp_path / "store")
    assert folder == same and "loaded" not in vars(again)
    assert (again.family, again.depth, again.width, again.normalize) == ("WavLM", 3, 768, False)
    waveforms, lengths = torch.randn(1, 4000), torch.tensor([4000])
    expected = first.hidden_states(waveforms, lengths, [3])
    torch.testing.assert_close(again.hidden_states(waveforms, lengths, [3]), expected, **CLOSE)


# Files that cannot be a teacher


def changed(make, change):
    """A file that `make` makes, with its content changed."""

    def build(folder):
        make(folder)
        content = torch.load(folder / "file.pt", weights_only=False)
        torch.save(change(content) or content, folder / "file.pt")
        return folder / "file.pt"

    return build


def of(content, file="file.pt"):
    """A file with this content."""

    def build(folder):
        torch.save(content, folder / file)
        return folder / file

    return build


def without(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


WHISPER_FILE = {"dims": {"n_mels": 80}, "model_state_dict": {"encoder.conv1.weight": torch.zeros(1)}}
BARE_WEIGHTS = {"wav2vec2.feature_projection.projection.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    "build, message",
    [
        (of(WHISPER_FILE), "OpenAI's own format of Whisper; give the folder .* Hugging Face's format"),
        (of(BARE_WEIGHTS, "pytorch_model.bin"), "no configuration of their model; give the folder"),
        (of({}, "model.safetensors"), "no configuration of their model; give the folder"),
        (of({}, "student.onnx"), "no configuration of their model; give the folder"),
        (of([1]), "holds no model that is known here; give"),
        (of({"model": {}, "cfg": None, "args": None}), "neither a cfg nor the args of a fairseq model"),
        (of({"model": {}, "cfg": {"model": {"_name": "data2vec_multi"}, "task": {}}}), "kind data2vec_multi; give one"),
        (of({"model": {}, "args": argparse.Namespace(arch="wav2vec")}), "kind wav2vec; give one of hubert"),
        (of({"model_weight": {}, "model_cfg": None, "task_cfg": {}}), "lacks the configuration of its model"),
        (changed(hubert_fine_tuned, without("cfg", "model", "w2v_args")), "in w2v_path=gone.pt; put the pre-trained"),
        (
            changed(wav2vec2_with_args, lambda content: vars(content["args"]).update(layer_type="conformer")),
            "model.layer_type=conformer; give a model whose layers are of the kind transformer",
        ),
        (
            changed(torchaudio_wavlm, without("encoder.transformer.layer_norm.bias")),
            "lacks the weight encoder.layer_norm.bias",
        ),
        (
            changed(
                torchaudio_large,
                lambda content: {key: value for key, value in content.items() if "feature_extractor" not in key},
            ),
            "has torchaudio's names of weights, but no bundle's shapes",
        ),
    ],
)
def test_a_file_that_cannot_be_a_teacher_gets_one_line(build, message, tmp_path):
    path = build(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_teacher(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
