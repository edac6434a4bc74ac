"""Options that change what is trained: a moving average, a shared CNN, shared heads; and names that do not exist."""

import pytest
import torch
from conftest import TINY, stock_hubert
from training import tiny, train
from transformers import Wav2Vec2FeatureExtractor

from fairseq_stack.export.student import export
from fairseq_stack.models.waveform_norm import normalize_waveforms


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("half", [False, True])
def test_the_moving_average_grows_with_the_student(half, speech, teacher_file, tmp_path):
    decay = 0.9
    options = {"ema.store_ema": True, "ema.ema_decay": decay, "checkpoint.save_interval_updates": 1,
               "checkpoint.keep_interval_updates": -1, "dataset.batch_size": 3,
               "common.bf16": half, "ema.ema_fp32": half}  # fmt: skip
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **options))
    before, after = (load(next((tmp_path / "checkpoints").glob(f"checkpoint_*_{update}.pt"))) for update in (6, 7))
    averages = [state["extra_state"]["ema_fp32_params" if half else "ema"] for state in (before, after)]
    for source, woken in ((1, 2), (5, 6), (9, 10)):
        name = "encoder.layers.{}.fc1.weight"
        grown_from, learned = averages[0][name.format(source)], after["model"][name.format(woken)]
        torch.testing.assert_close(averages[1][name.format(woken)], decay * grown_from + (1 - decay) * learned)
    assert after["extra_state"]["ema"]["stage"] == 2 and trainer.ema.get_model().depth == 12


def test_a_shared_cnn_runs_once_and_stays_the_teachers(speech, teacher_file, tmp_path):
    options = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0}
    runs = []
    for name, more in (
        ("shared", options),
        ("copied", {"+model.init_cnn_from_teacher": True, "+model.feature_grad_mult": 0}),
    ):
        trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path / name, **more))
        runs.append(load(tmp_path / name / "checkpoints/checkpoint_last.pt")["model"])
        calls = []
        trainer.get_model().feature_extractor.register_forward_hook(lambda *_: calls.append(name))
        batch = trainer.task.dataset("valid").collater([trainer.task.dataset("valid")[0]])
        trainer.task.valid_step(batch, trainer.model, trainer.criterion)
        assert len(calls) == (0 if name == "shared" else 1)
    teacher = load(teacher_file)["model"]
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key])  # the same mathematics, once less
        if key.startswith("feature_extractor"):
            assert torch.equal(value, teacher[key])


def test_one_head_can_serve_all_teacher_layers(speech, teacher_file, tmp_path):
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **{"+model.head_shared": True}))
    heads = trainer.get_model().heads
    assert heads["4"] is heads["8"] is heads["12"]
    separate = 3 * sum(parameter.numel() for parameter in heads["4"].parameters())
    assert sum(parameter.numel() for parameter in heads.parameters()) == separate // 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model.stack_method": "interlaced"}, "model.stack_method=interlaced is unknown; choose from none, interleaved"),
        ({"model.stack_schedule": "linear"}, "model.stack_schedule=linear is unknown; choose from equal, prop"),
        ({"model.stack_optimizer_state": "keep"}, "model.stack_optimizer_state=keep is unknown; choose from copy, reset"),
        ({"+model.extractor_mode": "batch_norm"}, "model.extractor_mode=batch_norm is unknown"),
        ({"+model.activation_fn": "sine"}, "model.activation_fn=sine is unknown; choose from"),
        ({"+criterion.loss": "l3"}, "criterion.loss=l3 is unknown; choose from"),
        ({"model.stack_method": "none"}, "model.stack_stages=4 has no meaning with model.stack_method=none"),
        ({"model.stack_method": "stackbert"}, "model.encoder_layers=12"),
        ({"+model.share_teacher_cnn": True}, "model.share_teacher_cnn=true needs"),
        ({"+task.normalize_epsilon": 0.0}, "task.normalize_epsilon=0.0 must lie between 0 and 1"),
        ({"+model.init_cnn_from_teacher": True, "model.conv_feature_layers": "[(4,10,5)] + [(4,3,2)] * 4 + [(4,2,2)] * 2"},
         "model.init_cnn_from_teacher=true"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_combination_gets_one_line(speech, teacher_file, tmp_path, options, message):
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **options))
    assert str(ended.value).startswith(f"error: {message}") and "\n" not in str(ended.value)


def test_a_student_hears_waveforms_normalised_as_transformers_does_and_agrees_there(speech, teacher_file, tmp_path):
    options = {"criterion.teacher_layers": [4, 8, 12], "optimization.max_update": 10}
    trainer = train("hubert_large", tiny(speech, teacher_file, tmp_path, **options))
    data = trainer.task.dataset("valid")
    sample = data.collater([data[index] for index in range(3)])
    sample["waveforms"] *= 0.01
    heard = trainer.task.with_targets(sample, trainer.get_model())["waveforms"]
    recorded = [row[:length].numpy() for row, length in zip(sample["waveforms"], sample["lengths"])]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(recorded, padding=True, sampling_rate=16_000, return_tensors="pt").input_values
    torch.testing.assert_close(heard, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        heard, normalize_waveforms(sample["waveforms"], torch.tensor(sample["lengths"]), 1e-5), atol=1e-3
    )

    proof = export(tmp_path / "checkpoints/checkpoint_last.pt", "huggingface", tmp_path / "student")
    assert proof["largest_difference_alone"] < 1e-4 and min(one["level"] for one in proof["alone"]) == 0.001


def test_a_shared_cnn_needs_the_teachers_normalisation(speech, tmp_path):
    model, cfg = stock_hubert(normalize=True, **TINY)
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict()}, tmp_path / "teacher.pt")
    options = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0, "task.normalize": True}
    with pytest.raises(SystemExit, match="^error: model.share_teacher_cnn=true .* set task.normalize_epsilon=1e-05"):
        train("librispeech_base", tiny(speech, tmp_path / "teacher.pt", tmp_path, **options))
    options.update({"+task.normalize_epsilon": 1e-5, "optimization.max_update": 10})
    train("librispeech_base", tiny(speech, tmp_path / "teacher.pt", tmp_path, **options))
    assert load(tmp_path / "checkpoints/checkpoint_last.pt")["cfg"]["task"]["normalize_epsilon"] == 1e-5
