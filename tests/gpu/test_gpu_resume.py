"""On a GPU: a resume across a growth, and NCCL with one process."""

import pytest
import torch
from fairseq.trainer import Trainer
from processes import free_port
from training import tiny, train

from fairseq_stack.tasks.speech_distillation import SpeechDistillation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKEND = "nccl"
TOLERANCE = 1e-3  # sums on a GPU have no fixed order


def trained(speech, teacher_file, folder):
    fields = {"optimization.max_update": 14, "checkpoint.save_interval_updates": 6}
    model = train("librispeech_base", tiny(speech, teacher_file, folder, **fields)).get_model()
    assert model.depth == 12
    return {name: value.float().cpu() for name, value in model.state_dict().items()}


def test_a_run_resumed_across_a_growth_ends_as_the_uninterrupted_one(speech, teacher_file, tmp_path, monkeypatch):
    expected = trained(speech, teacher_file, tmp_path / "whole")
    train_step = SpeechDistillation.train_step

    def stopped(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == 6:
            raise KeyboardInterrupt
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechDistillation, "train_step", stopped)
        trained(speech, teacher_file, tmp_path / "stopped")
    found = trained(speech, teacher_file, tmp_path / "stopped")  # grows at update 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE)


def test_a_single_process_under_nccl_trains_as_without_it(speech, teacher_file, tmp_path, monkeypatch):
    expected = trained(speech, teacher_file, tmp_path / "alone")
    monkeypatch.setattr(Trainer, "use_distributed_wrapper", True)  # fairseq does not wrap the model of one process
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group(BACKEND, init_method=address, rank=0, world_size=1)
    try:
        found = trained(speech, teacher_file, tmp_path / "nccl")
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE)
