"""Teachers against fairseq's and transformers' own forward passes.

All models are fairseq's and transformers' real ones, in tiny sizes and with random weights.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY
from fairseq.examples.data2vec.models.data2vec_audio import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
)
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fairseq_stack.errors import InputError
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.base import exact_fp32
from fairseq_stack.teachers.lazy import fingerprint
from fairseq_stack.teachers.whisper import log_mel

LENGTHS = [400, 401, 719, 720, 4321, 16_000]
LAYERS = range(4)  # 0 is the input of the first layer
CLOSE = dict(atol=3e-5, rtol=1e-4)


def waveforms_of(lengths, seed=1):
    """Random waveforms, as loud as speech and with an offset."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]


def shake(model, seed=0):
    """Move every weight, so that none is at a start value, such as a bias of zero, that hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_states(teacher, waveforms, references, layers=LAYERS):
    """Every hidden state, alone and in a padded batch, is the reference's."""
    lengths = [len(waveform) for waveform in waveforms]
    batch = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    together = teacher.hidden_states(batch, torch.tensor(lengths), layers)
    assert set(together) == set(layers)
    for row, (waveform, reference) in enumerate(zip(waveforms, references)):
        alone = teacher.hidden_states(waveform[None], torch.tensor([len(waveform)]), layers)
        frames = teacher.frames(len(waveform))
        for layer in layers:
            assert alone[layer].shape == (1, frames, teacher.width)
            torch.testing.assert_close(alone[layer][0], reference[layer], **CLOSE)
            torch.testing.assert_close(together[layer][row, :frames], reference[layer], **CLOSE)


# fairseq checkpoints

POST_NORM = {**TINY, "encoder_layers": 3}
PRE_NORM = {**POST_NORM, "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
DEEP = {"pos_conv_depth": 5, "conv_pos": 20, "extractor_mode": "layer_norm"}
FAIRSEQ = {
    "wav2vec2 base": (Wav2Vec2Model, Wav2Vec2Config, {**POST_NORM, "quantize_targets": True}, False),
    "wav2vec2 large": (Wav2Vec2Model, Wav2Vec2Config, {**PRE_NORM, "quantize_targets": True}, True),
    "data2vec base": (Data2VecAudioModel, Data2VecAudioConfig, {**POST_NORM, **DEEP}, False),
    "data2vec large": (Data2VecAudioModel, Data2VecAudioConfig, {**PRE_NORM, **DEEP}, True),
}
KINDS = {Wav2Vec2Model: "wav2vec2", Data2VecAudioModel: "data2vec_audio"}


def fairseq_checkpoint(folder, kind):
    """fairseq's model and the file that its pre-training would write of it."""
    architecture, config, shape, normalize = FAIRSEQ[kind]
    torch.manual_seed(0)
    averaging = {"ema_anneal_end_step": 1, "max_update": 1} if "data2vec" in kind else {}
    cfg = OmegaConf.structured(config(**shape, **averaging))
    model = shake(architecture(cfg))
    if averaging:
        model.set_num_updates(0)  # makes the moving average, which lands in the checkpoint as `_ema`
    model_cfg = {**OmegaConf.to_container(cfg, enum_to_str=True), "_name": KINDS[architecture]}
    content = {"cfg": {"model": model_cfg, "task": {"normalize": normalize}}, "model": model.state_dict()}
    torch.save({"args": None, **content}, folder / "teacher.pt")
    return model, folder / "teacher.pt", normalize


def fairseq_states(model, waveform, normalize):
    """{layer: [T, D]} of one utterance in fairseq's own forward pass."""
    states = {}
    hooks = [
        layer.register_forward_hook(lambda *given, number=number: states.update({number: given[2][0][:, 0]}))
        for number, layer in enumerate(model.encoder.layers, start=1)
    ]
    hooks.append(model.encoder.layers[0].register_forward_pre_hook(lambda _, given: states.update({0: given[0][:, 0]})))
    given = nn.functional.layer_norm(waveform, waveform.shape) if normalize else waveform
    with torch.no_grad():
        final = model.extract_features(given[None], None)["x"][0]
    for hook in hooks:
        hook.remove()
    return {number: state[: len(final)] for number, state in states.items()} | {len(states) - 1: final}


@pytest.mark.parametrize("kind", FAIRSEQ)
def test_every_hidden_state_is_fairseqs(kind, tmp_path):
    model, path, normalize = fairseq_checkpoint(tmp_path, kind)
    waveforms = waveforms_of(LENGTHS)
    assert_states(load_teacher(path), waveforms, [fairseq_states(model, w, normalize) for w in waveforms])


def test_the_checkpoints_hold_pre_training_weights_that_are_left_out(tmp_path):
    for kind, expected in (("wav2vec2 base", "quantizer.vars"), ("data2vec base", "_ema")):
        model, path, _ = fairseq_checkpoint(tmp_path, kind)
        assert expected in model.state_dict()
        assert not any(key.startswith(expected.split(".")[0]) for key in load_teacher(path).model.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.update(cfg=None), "neither a cfg nor the args of a fairseq model"),
        (lambda state: state["cfg"]["model"].update(_name="wav2vec"), "kind wav2vec; give one of hubert"),
        (lambda state: state["cfg"]["task"].update(normalize="no"), "normalize=no, neither true nor false"),
        (lambda state: state["model"].pop("encoder.layer_norm.bias"), "lacks the weight encoder.layer_norm.bias"),
        (lambda state: state["model"].update({"project_inp.bias": torch.zeros(1)}), "has the weight project_inp"),
        (lambda state: state["cfg"]["model"].update(encoder_ffn_embed_dim=31), "has the shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_one_line(change, message, tmp_path):
    _, path, _ = fairseq_checkpoint(tmp_path, "wav2vec2 base")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError, match=message) as error:
        load_teacher(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# Folders in Hugging Face's format

CONV = {"conv_dim": (8,) * 7, "conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **CONV}
POSITIONS = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
BASE = {**SHAPE, **POSITIONS, "feat_extract_norm": "group", "do_stable_layer_norm": False}
LARGE = {**SHAPE, **POSITIONS, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
HUGGING_FACE = {
    "hubert base": ("Hubert", BASE, False),
    "hubert large": ("Hubert", LARGE, True),
    "hubert with a batch norm": ("Hubert", {**BASE, "conv_pos_batch_norm": True}, False),
    "wav2vec2 base": ("Wav2Vec2", BASE, True),
    "wav2vec2 large": ("Wav2Vec2", LARGE, True),
    "wavlm base": ("WavLM", BASE, False),
    "wavlm large": ("WavLM", LARGE, True),
    "unispeech": ("UniSpeech", BASE, True),
    "unispeech-sat": ("UniSpeechSat", LARGE, True),
    "data2vec": ("Data2VecAudio", {**SHAPE, "conv_pos_kernel_size": 5, "num_conv_pos_embedding_groups": 4}, True),
}


def save_folder(folder, kind, head="Model", **options):
    """Save transformers' model and its feature extractor; returns both."""
    family, shape, normalize = HUGGING_FACE[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, vocab_size=5)
    model = shake(getattr(transformers, f"{family}{head}")(config))
    model.save_pretrained(folder, **options)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(folder)
    return model, extractor


def transformers_states(model, extractor, waveform):
    """{layer: [T, D]} of one utterance in transformers' own forward pass."""
    given = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        output = model(given, output_hidden_states=True)
    states = {layer: output.hidden_states[layer][0] for layer in LAYERS}
    # From version 5 on, transformers leaves the final layer norm out of the last of its hidden states.
    return {**states, LAYERS[-1]: output.last_hidden_state[0]}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_every_hidden_state_is_transformers(kind, tmp_path):
    model, extractor = save_folder(tmp_path, kind)
    waveforms = waveforms_of(LENGTHS)
    references = [transformers_states(model, extractor, waveform) for waveform in waveforms]
    assert_states(load_teacher(tmp_path), waveforms, references)


@pytest.mark.parametrize("kind", ["hubert large", "wavlm base"])
def test_only_the_layers_up_to_the_highest_target_run(kind, tmp_path):
    save_folder(tmp_path, kind)
    teacher = load_teacher(tmp_path)
    batch, lengths = torch.randn(2, 4000), torch.tensor([4000, 3000])
    every = teacher.hidden_states(batch, lengths, LAYERS)
    ran = []
    for number, layer in enumerate(teacher.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    chosen = teacher.hidden_states(batch, lengths, [2])
    assert ran == [1, 2] and set(chosen) == {2}
    torch.testing.assert_close(chosen[2], every[2])
    torch.testing.assert_close(teacher.hidden_states(batch, lengths, LAYERS)[3], every[3])


def test_half_precision_and_shards_change_nothing_but_rounding(tmp_path):
    model, _ = save_folder(tmp_path / "plain", "wav2vec2 large")
    model.half().save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    shutil.copy(tmp_path / "plain/preprocessor_config.json", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    batch, lengths = torch.randn(1, 4000), torch.tensor([4000])
    teachers = (load_teacher(tmp_path / name) for name in ("plain", "shards"))
    plain, shards = (teacher.hidden_states(batch, lengths, LAYERS) for teacher in teachers)
    torch.testing.assert_close(shards, plain, atol=0.02, rtol=0.02)
    assert shards[3].dtype == torch.float32


HEADS = {
    "ForCTC": ("wav2vec2 large", "hubert large", "wavlm base", "data2vec", "unispeech-sat"),
    "ForPreTraining": ("wav2vec2 base", "unispeech"),
    "ForSequenceClassification": ("hubert base", "data2vec"),
    "ForXVector": ("wavlm large",),
}


@pytest.mark.parametrize("head, kind", [(head, kind) for head, kinds in HEADS.items() for kind in kinds])
def test_a_head_makes_no_difference(head, kind, tmp_path):
    model, extractor = save_folder(tmp_path, kind, head)
    (waveform,) = waveforms_of([4000])
    reference = transformers_states(getattr(model, model.base_model_prefix), extractor, waveform)
    assert_states(load_teacher(tmp_path), [waveform], [reference])


def as_pickle(folder, shards=1, **options):
    """Turn model.safetensors into what transformers 4 wrote with safe_serialization=False, as many are published."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return
    files = {key: f"pytorch_model-{1 + number % shards:05}-of-{shards:05}.bin" for number, key in enumerate(weights)}
    for file in set(files.values()):
        torch.save({key: weights[key] for key in weights if files[key] == file}, folder / file, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [False, True])
def test_weights_that_torch_saved_are_the_same_and_known_by_their_content(shards, zipped, tmp_path):
    save_folder(tmp_path, "wav2vec2 base", head="ForCTC")
    given = torch.randn(1, 4000), torch.tensor([4000]), LAYERS
    expected = load_teacher(tmp_path).hidden_states(*given)
    as_pickle(tmp_path, shards, _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(load_teacher(tmp_path).hidden_states(*given), expected)
    before = fingerprint(tmp_path)
    (file, *_) = tmp_path.glob("*.bin")
    torch.save(torch.load(file, weights_only=True) | {"lm_head.bias": torch.ones(5)}, file)
    assert fingerprint(tmp_path) != before


def test_a_folder_of_a_processor_says_whether_to_normalise(tmp_path):
    # transformers 5 writes processor_config.json, transformers 4 preprocessor_config.json.
    save_folder(tmp_path, "hubert base")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    for normalize in (True, False):
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
        transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path)
        assert load_teacher(tmp_path).normalize is normalize


def test_without_a_processor_the_error_says_how_to_write_one(whisper, tmp_path):
    model, extractor = save_folder(tmp_path / "hubert", "hubert base")
    (tmp_path / "hubert/preprocessor_config.json").unlink()
    (tmp_path / "hubert/processor_config.json").write_text('{"processor_class": "Wav2Vec2Processor"}')
    with pytest.raises(InputError) as error:
        load_teacher(tmp_path / "hubert")
    written = re.search(r'else (\{"do_normalize": false\})', str(error.value))[1]
    (tmp_path / "hubert/preprocessor_config.json").write_text(written)
    assert load_teacher(tmp_path / "hubert").normalize is False
    shutil.copytree(whisper[0], tmp_path / "whisper")
    (tmp_path / "whisper/preprocessor_config.json").unlink()
    assert load_teacher(tmp_path / "whisper").depth == 3  # always a log-mel


def path_of(kind, whisper, folder):
    """A file or folder of one of the kinds."""
    if kind == "whisper":
        return whisper[0]
    if kind in FAIRSEQ:
        return fairseq_checkpoint(folder, kind)[1]
    save_folder(folder, kind)
    return folder


@pytest.mark.parametrize("kind", ["wav2vec2 base", "hubert large", "wavlm base", "whisper"])
def test_a_teacher_in_fp32_lets_no_gpu_round_to_tf32(kind, whisper, tmp_path):
    teacher = load_teacher(path_of(kind, whisper, tmp_path))
    before, seen = tf32(), []
    for module in teacher.model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)):
            module.register_forward_pre_hook(lambda *_: seen.extend(tf32()))
    waveforms, lengths = torch.randn(1, 16_000), torch.tensor([16_000])
    teacher.hidden_states(waveforms, lengths, LAYERS)
    if hasattr(teacher, "cnn_features"):
        teacher.cnn_features(waveforms, lengths)
    assert seen and not any(seen)
    assert tf32() == before == (True, False)


def tf32():
    """Whether torch lets a GPU round to TF32 in convolutions and in matrix products."""
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision == "tf32", torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 has these switches first")
def test_a_teacher_in_fp32_computes_whatever_has_been_set_before():
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch, precision in zip(switches, ("ieee", "tf32")):
            switch.fp32_precision = precision
        with exact_fp32():
            assert tf32() == (False, False)
        assert tf32() == (False, True)
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "kind", ["wav2vec2 base", "wav2vec2 large", "hubert base", "hubert large", "wavlm base", "whisper"]
)
def test_a_teacher_in_half_precision_says_nearly_the_same(precision, kind, whisper, tmp_path):
    path = path_of(kind, whisper, tmp_path)
    waveforms = waveforms_of([16_000, 9000])
    given = nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([16_000, 9000]), LAYERS
    exact = load_teacher(path).hidden_states(*given)
    teacher = load_teacher(path, precision=precision)
    rounded = teacher.hidden_states(*given)
    for layer in LAYERS:
        assert rounded[layer].dtype == teacher.dtype != torch.float32
        for row, waveform in enumerate(waveforms):
            frames = teacher.frames(len(waveform))
            difference = (rounded[layer] - exact[layer])[row, :frames].norm()
            assert difference < 0.1 * exact[layer][row, :frames].norm()


def test_weight_norm_under_its_older_names_is_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    save_folder(tmp_path, "hubert base")
    batch, lengths = torch.randn(1, 4000), torch.tensor([4000])
    expected = load_teacher(tmp_path).hidden_states(batch, lengths, LAYERS)
    weights = load_file(tmp_path / "model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = f"encoder.pos_conv_embed.conv.parametrizations.weight.{new}"
        weights[f"encoder.pos_conv_embed.conv.{old}"] = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_teacher(tmp_path).hidden_states(batch, lengths, LAYERS), expected)


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def hostile(folder):
    as_pickle(folder)
    torch.save({"weight": print}, folder / "pytorch_model.bin")


def cut_off(folder):
    as_pickle(folder)
    truncate(folder / "pytorch_model.bin")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 378342945\n"


def without_a_shard(folder):
    as_pickle(folder, shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: truncate(folder / "config.json"), "cannot be read as JSON"),
        (lambda folder: edit(folder / "config.json", model_type="bert"), "model_type=bert.* give one of hubert"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=2), "has the weight encoder.layers.2"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=4), "lacks the weight encoder.layers.3"),
        (lambda folder: edit(folder / "config.json", intermediate_size=31), "has the shape"),
        (lambda folder: edit(folder / "config.json", hidden_size="wide"), "describes no HubertModel"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda folder: edit(folder / "preprocessor_config.json", do_normalize=None), "do_normalize=None; say"),
        (lambda folder: edit(folder / "preprocessor_config.json", sampling_rate=8000), "sampling_rate=8000"),
        (lambda folder: truncate(folder / "model.safetensors"), "damaged"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (lambda folder: edit(folder / "config.json", feat_extract_activation="relu"), "feat_extract_activation=relu"),
        (lambda folder: edit(folder / "config.json", model_type="wav2vec2-conformer"), "give one of hubert"),
        (hostile, "pytorch_model.bin needs .*print to unpickle, and that could run code"),
        (lambda folder: (folder / "model.safetensors").write_text(POINTER), "is a pointer of Git LFS.*; git lfs pull"),
        (cut_off, "pytorch_model.bin is damaged or not a file that torch saved; copy it again"),
        (without_a_shard, "pytorch_model-00002-of-00002.bin is missing; copy it"),
    ],
)
def test_a_folder_that_does_not_fit_gets_one_line(change, message, tmp_path):
    save_folder(tmp_path, "hubert base")
    change(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_teacher(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_nothing_of_a_hostile_folder_runs(tmp_path):
    folder, marker = tmp_path / "teacher", tmp_path / "ran"
    save_folder(folder, "hubert base")
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    names = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "FeatureExtractor")}
    attention = {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"}
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit(folder / "config.json", auto_map=names, **attention, **quantization, trust_remote_code=True)
    edit(folder / "preprocessor_config.json", auto_map=names, feature_extractor_type="Evil")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere", "peft_type": "LORA"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/model.safetensors"}}')
    teacher = load_teacher(folder)
    assert teacher.depth == 3 and not marker.exists()
    assert "someone" not in str(vars(teacher.model.config))


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "does not exist; give a fairseq checkpoint or a folder in Hugging Face's format"),
        ("empty", "config.json is missing"),
        ("text", "damaged or not a checkpoint"),
        ("pointer", "is a pointer of Git LFS.*; git lfs pull"),
    ],
)
def test_anything_else_gets_one_line(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pointer").write_text(POINTER)
    with pytest.raises(InputError, match=message):
        load_teacher(tmp_path / name)


# Whisper

WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "vocab_size": 5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A folder of a tiny WhisperModel, its encoder, and its feature extractor."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    model = shake(transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)))
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor()
    extractor.save_pretrained(folder)
    return folder, model.encoder, extractor


def whisper_states(encoder, mel, frames):
    """{layer: [frames, D]} of transformers' own WhisperEncoder on [bands, M], cut to M / 2 positions."""
    config = transformers.WhisperConfig(**WHISPER)
    reference = WhisperEncoder(config).eval()
    reference.load_state_dict(encoder.state_dict())
    positions = -(-mel.shape[1] // 2)
    reference.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions])
    # It insists on twice as many mel frames as positions; a half stands for an odd number of them.
    vars(reference.config)["max_source_positions"] = mel.shape[1] / 2
    with torch.no_grad():
        output = reference(torch.as_tensor(mel)[None], output_hidden_states=True)
    states = {layer: output.hidden_states[layer][0, :frames] for layer in LAYERS}
    return {**states, LAYERS[-1]: output.last_hidden_state[0, :frames]}


@pytest.mark.parametrize("pad", [False, True])
def test_every_hidden_state_of_whisper_is_transformers(whisper, pad):
    folder, encoder, extractor = whisper
    teacher = load_teacher(folder, whisper_pad=pad)
    waveforms = waveforms_of(LENGTHS)
    references = []
    for waveform in waveforms:
        options = {"padding": "max_length" if pad else "do_not_pad", "return_tensors": "np"}
        mel = extractor(waveform.numpy(), sampling_rate=16_000, **options).input_features[0]
        references.append(whisper_states(encoder, mel, teacher.frames(len(waveform))))
    assert_states(teacher, waveforms, references)


@pytest.mark.parametrize("bands", [80, 128])
def test_log_mel_is_that_of_transformers_feature_extractor(bands):
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
    filters = torch.from_numpy(extractor.mel_filters).float().T
    lengths = [*LENGTHS, 16_079, 16_080, 16_159]
    waveforms = waveforms_of(lengths)
    waveforms[4][:2000] = 0  # digital silence meets the floor of the dynamic range
    batch = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    ours = log_mel(batch, torch.tensor(lengths), filters)
    for row, waveform in enumerate(waveforms):
        given = extractor(waveform.numpy(), sampling_rate=16_000, padding="do_not_pad", return_tensors="np")
        expected = given.input_features[0]
        assert expected.shape == (bands, len(waveform) // 160)
        np.testing.assert_allclose(ours[row, :, : expected.shape[1]], expected, atol=1e-4)
        assert not ours[row, :, expected.shape[1] :].any()


def test_whisper_has_huberts_frames_and_never_fewer_of_its_own():
    from fairseq_stack.models.conv_geometry import frames_from_samples
    from fairseq_stack.teachers.whisper import FRAMES

    for samples in range(400, 4000):
        huberts, whispers = frames_from_samples(samples, FRAMES), -(-(samples // 160) // 2)
        assert huberts == (samples - 80) // 320 and 0 <= whispers - huberts <= 1


def test_the_encoder_alone_loads_like_the_whole_model(whisper, tmp_path):
    folder, encoder, extractor = whisper
    encoder.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    batch, lengths = torch.randn(1, 4000), torch.tensor([4000])
    whole, alone = (load_teacher(path).hidden_states(batch, lengths, LAYERS) for path in (folder, tmp_path))
    torch.testing.assert_close(alone, whole)


def test_what_whisper_cannot_take_gets_one_line(whisper, teacher_file, tmp_path):
    teacher = load_teacher(whisper[0])
    assert teacher.frames(480_000) == 1499
    with pytest.raises(InputError, match="at most 480000 samples.*task.max_sample_size to 480000 or less"):
        teacher.frames(480_001)
    with pytest.raises(InputError, match="at most 480000 samples"):
        teacher.hidden_states(torch.zeros(1, 480_001), torch.tensor([480_001]), [1])
    save_folder(tmp_path, "hubert base")
    for path in (teacher_file, tmp_path):
        with pytest.raises(InputError, match="task.whisper_pad=true"):
            load_teacher(path, whisper_pad=True)


@pytest.mark.parametrize(
    "inside, message",
    [
        ("snapshots/abc/config.json", "give one of these in the folder: .*/snapshots/abc$"),
        ("checkpoint-500/config.json", "give one of these in the folder: .*/checkpoint-500$"),
        ("hubert_base_ls960.pt", "give one of these in the folder: .*/hubert_base_ls960.pt$"),
        ("adapter_config.json", "an adapter without its model; load both with peft"),
        ("README.md", "a folder that transformers' save_pretrained wrote, or a file$"),
    ],
)
def test_a_folder_around_a_teacher_tells_where_it_is(inside, message, tmp_path):
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inside).write_text("{}")
    with pytest.raises(InputError, match=message) as error:
        load_teacher(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_names_the_folder(file, tmp_path):
    save_folder(tmp_path / "model", "hubert base")
    with pytest.raises(InputError, match=f"one file of a folder in Hugging Face's format; give {tmp_path}/model$"):
        load_teacher(tmp_path / "model" / file)
