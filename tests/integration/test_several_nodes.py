"""The launch configuration for SLURM fits the recipes, fairseq and its launcher."""

import pickle

import pytest
import torch
from fairseq.dataclass.configs import DistributedTrainingConfig
from fairseq.dataclass.initialize import hydra_init
from fairseq.distributed.utils import infer_init_method
from fork_server import ForkServer
from hydra.core.plugins import Plugins
from processes import start_submitted, wait
from training import EXAMPLES, composed, tiny

import fairseq_stack

SPEECH = ["task.data=manifests", "task.teacher=teacher.pt"]
# The module to import, and the reason of the skip. It is part of [test] where fairseq has a hydra that it works with.
SUBMITIT = ("hydra_plugins.hydra_submitit_launcher", None, "needs Python 3.11 and pip install -e .[slurm]")
RECIPES = sorted(path.stem for path in (EXAMPLES / "interleaved").glob("*.yaml"))


@pytest.fixture
def third_node(tmp_path, monkeypatch):
    """Tells what SLURM tells the first process of the third of four nodes."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\nnode3\\nnode4\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def tell(tasks_per_node, local=0):
        place = {"JOB_NODELIST": "node[1-4]", "NNODES": 4, "NTASKS_PER_NODE": tasks_per_node, "NODEID": 2,
                 "PROCID": 2 * tasks_per_node + local, "LOCALID": local}  # fmt: skip
        for name, value in place.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return tell


@pytest.mark.parametrize("recipe", RECIPES)
def test_slurms_configuration_starts_a_process_for_each_gpu_of_all_nodes(recipe, third_node):
    pytest.importorskip(*SUBMITIT)
    hydra_init(recipe)
    overrides = [*SPEECH, "+run_config=slurm", "hydra/launcher=submitit_slurm"]
    cfg = composed(recipe, overrides, return_hydra_config=True)
    launcher, training = cfg.hydra.launcher, cfg.distributed_training
    assert launcher._target_.endswith("SlurmLauncher") and launcher.name == recipe
    assert launcher.tasks_per_node == launcher.gpus_per_node
    assert cfg.hydra.sweep.dir == cfg.hydra.sweep.subdir == "."

    assert launcher.nodes == 4
    third_node(launcher.tasks_per_node)
    infer_init_method(training)
    assert training.distributed_init_method == "tcp://node1:29671" and training.distributed_no_spawn
    assert (training.distributed_rank, training.device_id) == (2 * launcher.tasks_per_node, 0)


@pytest.mark.parametrize("tasks_per_node", [1, 2])
def test_without_a_gpu_each_process_that_slurm_starts_is_a_rank(tasks_per_node, third_node, monkeypatch):
    fairseq_stack.register()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training = DistributedTrainingConfig(distributed_world_size=4 * tasks_per_node, distributed_port=29671, tpu=False)
    third_node(tasks_per_node, local=tasks_per_node - 1)
    infer_init_method(training)
    assert training.distributed_init_method == "tcp://node1:29671" and training.distributed_no_spawn
    assert (training.distributed_rank, training.distributed_world_size) == (3 * tasks_per_node - 1, 4 * tasks_per_node)
    assert (training.device_id, training.distributed_backend) == (0, "gloo")


def test_a_requeued_job_imports_what_checks_its_fields():
    """submitit pickles hydra's plugins with the job then, and the job does not look for them."""
    assert b"hydra_plugins.fairseq_stack_fields" in pickle.dumps(Plugins.instance())


def test_bad_input_of_a_submitted_job_is_one_line_in_its_log(speech, teacher_file, tmp_path):
    pytest.importorskip(*SUBMITIT)
    mistakes = {  # in what fairseq's command does first, and in fairseq's training
        "+optimizer.bate=1": "error: optimizer.bate is no field of optimizer._name=adamw; take it out",
        "task.data=/nonexistent": "error: task.data=/nonexistent does not exist",
    }
    with ForkServer() as server:
        jobs = [
            start_submitted(
                server, "librispeech_base", [*tiny(speech, teacher_file, tmp_path), mistake], tmp_path / str(number)
            )
            for number, mistake in enumerate(mistakes)
        ]
        assert wait(jobs) == [1, 1]
    for number, line in enumerate(mistakes.values()):
        (log,) = (tmp_path / str(number)).glob(".submitit/*/*_0_log.err")
        assert log.read_text().splitlines()[-1].startswith(line)
        assert "Traceback" not in log.read_text()
