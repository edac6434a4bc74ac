"""Growth and resume in the precisions that need a GPU, fp16 with its flat masters among them."""

import pytest
import torch
from growth_checks import check_every_growth
from training import tiny, train

from fairseq_stack.tasks.speech_distillation import SpeechDistillation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PRECISIONS = {
    "fp16": {"common.fp16": True},
    "fp16 without a flat buffer": {"common.fp16": True, "common.fp16_no_flatten_grads": True},
    "memory-efficient fp16": {"common.fp16": True, "common.memory_efficient_fp16": True},
    "bf16": {"common.bf16": True},
    "AMP": {"common.amp": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_moments_and_weights_agree_after_each_growth_and_the_loss_is_that_of_a_fresh_model(
    precision, speech, teacher_file, tmp_path, monkeypatch
):
    checked = check_every_growth(monkeypatch)
    fields = {"optimization.max_update": 14, "checkpoint.no_save": True, **PRECISIONS[precision]}
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
    assert checked == [1, 4, 8]
    assert trainer.get_model().depth == 12


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_begins_with_the_masters_moments_and_loss_scale_that_were_saved(
    precision, speech, teacher_file, tmp_path, monkeypatch
):
    def run(updates):
        fields = {"optimization.max_update": updates, "model.stack_stages": 2, **PRECISIONS[precision]}
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))

    run(8)
    saved = torch.load(tmp_path / "checkpoints/checkpoint_last.pt", weights_only=True)["last_optimizer_state"]
    train_step, begun = SpeechDistillation.train_step, []

    def remembered(task, sample, model, criterion, optimizer, *args, **kwargs):
        if not begun:
            begun.append(leaves(optimizer.state_dict()))
        return train_step(task, sample, model, criterion, optimizer, *args, **kwargs)

    monkeypatch.setattr(SpeechDistillation, "train_step", remembered)
    run(12)
    assert "scaler" in saved or precision == "bf16"
    saved = leaves(saved)
    assert len(begun[0]) == len(saved)
    for ours, theirs in zip(begun[0], saved):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


def leaves(state):
    """Copies of the tensors and plain values of a state, in order; not the parameter groups, which hold the rate."""
    if isinstance(state, dict):
        return [leaf for name, value in state.items() if name != "param_groups" for leaf in leaves(value)]
    if isinstance(state, (list, tuple)):
        return [leaf for value in state for leaf in leaves(value)]
    return [state.float().cpu().clone() if torch.is_tensor(state) else state]
