"""Growth in the precisions that a CPU has: masters, moments and weights agree, and so does the loss."""

import pytest
import torch
from growth_checks import check_every_growth
from training import tiny, train

from fairseq_stack import run_state

PRECISIONS = {
    "fp32": {},
    "bf16": {"common.bf16": True},
    "memory-efficient bf16": {"common.bf16": True, "common.memory_efficient_bf16": True},
}
OPTIMIZERS = {"bf16": run_state.FP16Optimizer, "memory-efficient bf16": run_state.MemoryEfficientFP16Optimizer}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_moments_and_weights_agree_after_each_growth_and_the_loss_is_that_of_a_fresh_model(
    precision, speech, teacher_file, tmp_path, monkeypatch
):
    checked = check_every_growth(monkeypatch)
    fields = {"optimization.max_update": 14, "checkpoint.no_save": True, **PRECISIONS[precision]}
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    assert checked == [1, 4, 8]
    assert trainer.model.layer_norm.weight.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert type(trainer.optimizer) is OPTIMIZERS.get(precision, type(trainer.optimizer))
