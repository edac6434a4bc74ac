"""Growth in the precisions that a CPU has: masters, moments and weights agree, and so does the loss."""

import pytest
import torch
from growth_checks import check_every_growth
from training import tiny, train

from fairseq_stack.training.optimizers import AMPOptimizer, FP16Optimizer, MemoryEfficientFP16Optimizer

PRECISIONS = {
    "fp32": {},
    "bf16": {"common.bf16": True},
    "memory-efficient bf16": {"common.bf16": True, "common.memory_efficient_bf16": True},
    "amp": {"common.amp": True, "common.amp_init_scale": 1024},
    "bf16, muon": {"common.bf16": True, "optimizer._name": "muon"},
    "amp, muon": {"common.amp": True, "common.amp_init_scale": 1024, "optimizer._name": "muon"},
}
OPTIMIZERS = {
    "bf16": FP16Optimizer,
    "memory-efficient bf16": MemoryEfficientFP16Optimizer,
    "amp": AMPOptimizer,
    "bf16, muon": FP16Optimizer,
    "amp, muon": AMPOptimizer,
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_moments_and_weights_agree_after_each_growth_and_the_loss_is_that_of_a_fresh_model(
    precision, speech, teacher_file, tmp_path, monkeypatch
):
    checked = check_every_growth(monkeypatch)
    fields = {"optimization.max_update": 14, "checkpoint.no_save": True, **PRECISIONS[precision]}
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    assert checked == [1, 4, 8]
    assert trainer.model.layer_norm.weight.dtype == (torch.bfloat16 if "bf16" in precision else torch.float32)
    assert type(trainer.optimizer) is OPTIMIZERS.get(precision, type(trainer.optimizer))


def test_amp_moves_the_weights_as_fp32_does(speech, teacher_file, tmp_path):
    # Of six updates with a growth, of two batches each, clipped. On a CPU the model computes in fp32 in both.
    weights = []
    for amp in (False, True):
        fields = {"common.amp": amp, "common.amp_init_scale": 1024, "checkpoint.no_save": True,
                  "optimization.max_update": 6, "model.stack_stages": 2, "optimization.clip_norm": 1.0,
                  "optimization.update_freq": "[2]"}  # fmt: skip
        trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path / str(amp), **fields))
        weights.append(trainer.get_model().state_dict())
    assert trainer.optimizer.scaler.get_scale() == 1024
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
