"""The launch configurations for several nodes fit the recipes, fairseq and the launchers."""

import pytest
from fairseq.dataclass.initialize import hydra_init
from fairseq.distributed.utils import infer_init_method
from training import EXAMPLES, composed

SPEECH = ["task.data=manifests", "task.teacher=teacher.pt"]
RECIPES = sorted(path.stem for path in (EXAMPLES / "interleaved").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchruns_configuration_leaves_the_number_of_processes_to_torchrun(recipe):
    hydra_init(recipe)
    plain, launched = (composed(recipe, [*SPEECH, *more]) for more in ([], ["+run_config=torchrun"]))
    assert launched.distributed_training.distributed_world_size > 1
    launched.distributed_training.distributed_world_size = plain.distributed_training.distributed_world_size
    assert launched == plain


@pytest.mark.parametrize("recipe", RECIPES)
def test_slurms_configuration_starts_a_process_for_each_gpu_of_all_nodes(recipe, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install -e .[slurm]")
    hydra_init(recipe)
    overrides = [*SPEECH, "+run_config=slurm", "hydra/launcher=submitit_slurm"]
    cfg = composed(recipe, overrides, return_hydra_config=True)
    launcher, training = cfg.hydra.launcher, cfg.distributed_training
    assert launcher._target_.endswith("SlurmLauncher") and launcher.name == recipe
    assert launcher.tasks_per_node == launcher.gpus_per_node
    assert cfg.hydra.sweep.dir == cfg.hydra.sweep.subdir == "."

    # The first process of the third node, as SLURM tells it and as fairseq understands it.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\nnode3\\nnode4\\n'\n")
    scontrol.chmod(0o755)
    rank = 2 * launcher.tasks_per_node
    place = {"JOB_NODELIST": "node[1-4]", "NNODES": launcher.nodes, "NTASKS_PER_NODE": launcher.tasks_per_node,
             "NODEID": 2, "PROCID": rank, "LOCALID": 0}  # fmt: skip
    for name, value in place.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    infer_init_method(training)
    assert training.distributed_init_method == "tcp://node1:29671" and training.distributed_no_spawn
    assert (training.distributed_rank, training.device_id) == (rank, 0)
