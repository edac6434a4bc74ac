"""A job of two nodes that SLURM preempts, for scripts/slurm_trial.sh; pytest does not collect it by itself."""

import os
import re
import time

import pytest
from killing import same_state
from training import EXAMPLES, ROOT, command, tiny

# An extension that makes updates slow enough to be preempted between two of them.
SLOW = """
import time
from fairseq_stack.tasks.speech_distillation import SpeechDistillation

train_step = SpeechDistillation.train_step

def slow(task, *args, **kwargs):
    time.sleep(0.5)
    return train_step(task, *args, **kwargs)

SpeechDistillation.train_step = slow
"""


@pytest.fixture
def submit(speech, teacher_file, tmp_path):
    """Start the command of docs/several_nodes.md in a folder of its own."""

    def start(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "slow.py").write_text(SLOW)
        fields = {
            "+task.extensions": f"[{folder}/slow.py]",
            "optimization.max_update": 14,
            "dataset.disable_validation": True,
            "common.user_dir": f"{ROOT}/fairseq_stack",
            "distributed_training.distributed_world_size": 2,
            "hydra/launcher": "submitit_slurm",
            "hydra.launcher.nodes": 2,
            "hydra.launcher.tasks_per_node": 1,
            "hydra.launcher.gpus_per_node": "null",
            "hydra.launcher.cpus_per_task": 1,
            "hydra.launcher.mem_gb": "null",
        }
        overrides = [*tiny(speech, teacher_file, folder, **fields), "+run_config=slurm"]
        return folder, command("fairseq-hydra-train", "--multirun", "--config-dir", EXAMPLES / "interleaved",
                               "--config-name", "librispeech_base", *overrides, cwd=folder)  # fmt: skip

    return start


def log(folder):
    return "".join(path.read_text() for path in sorted(folder.glob("outputs/slurm/*/*_log.*")))


def finish(folder, job):
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 0, output + log(folder)


def wait_for(what, folder, job):
    while not re.search(what, log(folder)):
        assert job.poll() is None, log(folder)
        time.sleep(0.1)


@pytest.fixture
def uninterrupted(submit):
    folder, job = submit("uninterrupted")
    finish(folder, job)
    return folder


def test_a_job_that_is_interrupted_is_requeued_and_ends_with_the_weights_of_an_uninterrupted_one(submit, uninterrupted):
    interruptions = {
        "SIGTERM": "sbatch --quiet --partition high --nodes 2 --output /dev/null --wrap 'sleep 1'",
        "SIGUSR2": "scancel --signal USR2 {}",  # SLURM itself sends it some time before the time limit
    }
    for name, interrupt in interruptions.items():
        folder, job = submit(name)
        wait_for(r"num_updates=4,", folder, job)
        (number,) = (path.name for path in (folder / "outputs/slurm").iterdir() if path.name.isdigit())
        os.system(interrupt.format(number))
        finish(folder, job)
        (ended,) = re.findall(rf"{name} ends the run at update (\d+)", log(folder))
        assert re.search(rf"Loaded checkpoint \S+ \(epoch \d+ @ {ended} updates\)", log(folder)), log(folder)
        assert same_state(folder, uninterrupted)
        print(f"{name} at update {ended}: requeued, finished with the same weights and optimizer state")
