"""Every way to train takes its path on a GPU through fairseq's own trainer, over a growth and a validation.

A pretended GPU computes what the CPU computes and refuses what a GPU refuses: see fairseq_stack/benchmark/pretended_gpu.py.
"""

import contextlib

import pytest
import torch
import transformers
from training import tiny, train

from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.teachers.base import PRECISIONS

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that does not ask CUDA's driver, newer than 2.4")

FP16, BF16, AMP = ({f"common.{name}": True} for name in ("fp16", "bf16", "amp"))
MASKED = {"+task.mask_prob": 0.5, "+task.mask_length": 4}
SHARED_CNN = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0.0}
GRAM = {"+criterion.loss": "temporal_gram", "+criterion.output_weight": 0.0}
HEADS = {"+criterion.intermediate_style": "prediction", "+criterion.output_weight": 0.0, "+model.head_inner_dim": 16}
UNITS = {"+criterion.loss": "units"}
AVERAGED = {"ema.store_ema": True, "ema.ema_decay": 0.9}
PRE_NORM = {
    "+model.extractor_mode": "layer_norm",
    "+model.layer_norm_first": True,
    "+model.conv_bias": True,
    "task.normalize": True,
}
PLATEAU = {
    "model.stack_schedule": "plateau",
    "model.stack_alpha": 0,  # the stages begin at updates 0 and 2
    "+model.stack_patience": 1,
    "optimization.max_update": 4,
    "dataset.validate_interval_updates": 1,
    "+optimization.update_freq": [2],
}
WAVLM, WHISPER, STORE = "WavLM", "Whisper", "task.target_store"  # made for the test

TRAININGS = {
    "fp32": {},
    "fp16, adam": {**FP16, "optimizer._name": "adam"},
    "fp16": FP16,
    "fp16 without flat masters": {**FP16, "common.fp16_no_flatten_grads": True},
    "fp16, memory-efficient, moving average, silent copies": {
        **FP16,
        "common.memory_efficient_fp16": True,
        **AVERAGED,
        "+model.stack_silent_copies": True,
    },
    "bf16, moments reset": {**BF16, "model.stack_optimizer_state": "reset"},
    "AMP, clipped": {**AMP, "optimization.clip_norm": 1.0},
    "fp16, masked": {**FP16, **MASKED},
    "bf16, masked, layer-normalised targets": {**BF16, **MASKED, "+criterion.target_normalization": "layer_norm"},
    "AMP, instance-normalised targets": {**AMP, "+criterion.target_normalization": "instance_norm"},
    "fp16, temporal Gram matrices": {**FP16, **GRAM},
    "AMP, temporal Gram matrices": {**AMP, **GRAM},
    "fp16, L1 and cosine, prediction heads": {**FP16, **HEADS, "+criterion.loss": "l1_cosine"},
    "AMP, shared CNN": {**AMP, **SHARED_CNN},
    "bf16, shared CNN, bf16 teacher": {**BF16, **SHARED_CNN, "+task.teacher_precision": "bf16"},
    "fp16, fp16 teacher, normalised": {**FP16, "+task.teacher_precision": "fp16", "task.normalize": True},
    "fp16, store": {**FP16, STORE: "fp16"},
    "bf16, int8 store with a shared CNN": {**BF16, STORE: "int8", **SHARED_CNN},
    "bf16, store of codes with a shared CNN": {**BF16, STORE: "pq4", **SHARED_CNN},
    "AMP, units, masked": {**AMP, STORE: "units20", **UNITS, **MASKED},
    "fp16, units, masked, prediction heads, moving average": {
        **FP16,
        STORE: "units300",  # in two bytes
        **UNITS,
        **MASKED,
        **HEADS,
        **AVERAGED,
    },
    "bf16, codes, shared CNN": {**BF16, STORE: "pq4", "+criterion.loss": "codes", **SHARED_CNN},
    "fp16, moving average in fp32": {**FP16, **AVERAGED, "ema.ema_fp32": True},
    "AMP, moving average": {**AMP, **AVERAGED},
    "fp16, plateau, accumulated gradients": {**FP16, **PLATEAU},
    "fp16, pre-norm, frozen CNN": {**FP16, **PRE_NORM, "+model.feature_grad_mult": 0.0},
    "AMP, pre-norm": {**AMP, **PRE_NORM},
    "fp16, from the teacher's CNN and layers": {
        **FP16,
        "+model.init_cnn_from_teacher": True,
        "+model.init_layers_from_teacher": "[1,2]",
        "+model.feature_grad_mult": 0.1,
    },
    "fp16, Muon, silent copies": {**FP16, "optimizer._name": "muon", "+model.stack_silent_copies": True},
    "bf16, Muon, frozen CNN": {**BF16, "optimizer._name": "muon", "+model.feature_grad_mult": 0.0},
    "AMP, Muon, clipped": {**AMP, "optimizer._name": "muon", "optimization.clip_norm": 1.0},
    "bf16, batches of one": {**BF16, "dataset.batch_size": 1},
    "fp16, WavLM": {**FP16, "task.teacher": WAVLM},
    "bf16, WavLM in bf16": {**BF16, "task.teacher": WAVLM, "+task.teacher_precision": "bf16"},
    "fp16, Whisper in fp16": {**FP16, "task.teacher": WHISPER, "+task.teacher_precision": "fp16"},
    "bf16, Whisper padded to 30 s": {**BF16, "task.teacher": WHISPER, "+task.whisper_pad": True},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_on_a_gpu_keeps_its_devices_and_types_apart(name, speech, teacher_file, tmp_path):
    fields = {
        "optimization.max_update": 2,
        "dataset.validate_interval_updates": 2,
        "model.encoder_layers": 4,
        "model.stack_stages": 2,
        "criterion.teacher_layers": "[6,12]",
        "model.stack_schedule": "equal",
        "dataset.batch_size": 2,
        "checkpoint.no_save": True,
        **TRAININGS[name],
    }
    teacher = made(fields.pop("task.teacher", teacher_file), tmp_path)
    if STORE in fields:
        fields |= {"+task.target_format": fields.pop(STORE), f"+{STORE}": tmp_path / "store"}
    with pretended_gpu() as machine:
        student = train("librispeech_base", tiny(speech, teacher, tmp_path, **fields)).get_model()
        assert student.depth == 4 and machine.launches
        for parameter in student.parameters():
            assert parameter.is_cuda and bool(parameter.isfinite().all())


@pytest.mark.parametrize(
    "precision",
    [
        {},
        FP16,
        BF16,
        AMP,
        {**FP16, "common.memory_efficient_fp16": True},
        {**BF16, "common.memory_efficient_bf16": True},
        {**FP16, "common.fp16_no_flatten_grads": True},
    ],
    ids=lambda fields: ", ".join(name.removeprefix("common.") for name in fields) or "fp32",
)
def test_a_resumed_run_finds_its_optimizers_state_on_the_gpu(precision, speech, teacher_file, tmp_path):
    def run(updates):
        fields = {"optimization.max_update": updates, "model.stack_method": "none"}
        fields |= {"model.stack_stages": 1, "dataset.disable_validation": True, **precision}
        return train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))

    with pretended_gpu():
        run(2)
        trainer = run(3)
        assert trainer.get_num_updates() == 3
        for parameter, state in trainer.optimizer.optimizer.state.items():
            assert parameter.is_cuda and state["exp_avg"].is_cuda and state["exp_avg_sq"].is_cuda


@pytest.mark.parametrize("teacher", ["HuBERT", WAVLM, WHISPER])
def test_the_cpu_waits_once_for_each_update_of_padded_utterances(teacher, speech, teacher_file, tmp_path):
    teacher = made(teacher_file if teacher == "HuBERT" else teacher, tmp_path)
    fields = {"model.stack_method": "none", "model.stack_stages": 1, **FP16, "task.normalize": True}
    waits = []
    for updates in (2, 4):
        fields |= {"optimization.max_update": updates, "checkpoint.no_save": True, "dataset.disable_validation": True}
        with pretended_gpu() as machine:
            train("librispeech_base", tiny(speech, teacher, tmp_path, **fields))
            waits.append(machine.waits)
    assert (waits[1] - waits[0]).total() == 2, waits[1] - waits[0]


@pytest.mark.parametrize("capability, precision", [((9, 0), "bf16"), ((7, 0), "fp16"), (None, "fp32")])
def test_a_teacher_is_in_half_precision_on_a_gpu_and_the_checkpoint_says_so(
    capability, precision, speech, teacher_file, tmp_path, monkeypatch
):
    fields = {"model.stack_method": "none", "model.stack_stages": 1, "optimization.max_update": 1}
    overrides = tiny(speech, teacher_file, tmp_path, **fields, **{"checkpoint.no_save": True})
    with pretended_gpu() if capability else contextlib.nullcontext():
        if capability:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        trainer = train("librispeech_base", overrides)
        assert trainer.task.teacher.dtype == PRECISIONS[precision]
    assert trainer.cfg.task.teacher_precision == precision


def made(teacher, folder):
    """The path of a teacher, which is made in the folder if it is the name of one of FOLDERS."""
    if teacher not in FOLDERS:
        return teacher
    FOLDERS[teacher](folder / "teacher")
    return folder / "teacher"


def wavlm(folder):
    config = transformers.WavLMConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=4, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WavLMModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


def whisper(folder):
    config = transformers.WhisperConfig(
        d_model=8, encoder_layers=12, encoder_attention_heads=1, encoder_ffn_dim=8, decoder_layers=1,
        decoder_attention_heads=1, decoder_ffn_dim=8, vocab_size=5, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WhisperModel(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)


FOLDERS = {WAVLM: wavlm, WHISPER: whisper}


def test_the_path_on_a_gpu_and_that_on_a_cpu_lead_to_the_same_weights(speech, teacher_file, tmp_path):
    fields = {"optimization.max_update": 4, "model.stack_stages": 2, "checkpoint.no_save": True, **MASKED}
    fields |= {"model.dropout": 0.0, "model.attention_dropout": 0.0, "+task.teacher_precision": "fp32"}
    overrides = tiny(speech, teacher_file, tmp_path, **fields)
    on_cpu = train("librispeech_base", overrides).get_model().state_dict()
    with pretended_gpu():
        on_gpu = {
            name: value.cpu() for name, value in train("librispeech_base", overrides).get_model().state_dict().items()
        }
    assert on_cpu.keys() == on_gpu.keys()
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-3, atol=1e-5)
