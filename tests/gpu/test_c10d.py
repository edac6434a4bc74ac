"""Two processes that share a GPU, under fairseq's c10d backend, which it does not start without one."""

import pytest
import torch
from fork_server import ForkServer
from processes import start_job, wait
from training import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_under_c10d_all_processes_hold_the_same_weights_after_each_growth(speech, teacher_file, tmp_path):
    fields = {
        "optimization.max_update": 14,
        "checkpoint.no_save": True,
        "distributed_training.ddp_backend": "c10d",
        "distributed_training.find_unused_parameters": True,
    }
    with ForkServer() as server:
        codes = wait(start_job(server, "librispeech_base", tiny(speech, teacher_file, tmp_path, **fields), tmp_path))
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()
    for update in (1, 4, 8):
        first, second = (torch.load(tmp_path / f"rank{rank}-grown{update}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
