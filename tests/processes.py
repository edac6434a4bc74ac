"""Start the processes of one job as a cluster's launcher does, each with fairseq's command."""

import os
import signal
import socket
import sys
import time

import torch
from fairseq import tasks
from fairseq_cli import hydra_train
from torch.distributed import run
from torch.nn.parallel import DistributedDataParallel
from training import ROOT, configuration

from fairseq_stack.tasks.speech_distillation import SpeechDistillation
from fairseq_stack.training import guards as fairseq_guards
from fairseq_stack.training.trainer import StudentTrainer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_job(server, config, overrides, folder, misfortunes=None):
    """Start the two ranks of `fairseq-hydra-train` on a recipe.

    Each rank writes its output to folder/rank0.log or rank1.log, and what `record` does.

    Args:
        server: a ForkServer.
        misfortunes: {rank: function}, called in that rank before it trains; see below.
    """
    folder.mkdir(exist_ok=True)
    together = [
        *overrides,
        f"distributed_training.distributed_init_method=tcp://127.0.0.1:{free_port()}",
        "distributed_training.distributed_world_size=2",
        "distributed_training.distributed_no_spawn=true",
        "distributed_training.distributed_backend=gloo",
        f"common.user_dir={ROOT}/fairseq_stack",
        f"hydra.output_subdir={folder}/.hydra",
        f"hydra.job_logging.handlers.file.filename={folder}/train.log",
    ]
    misfortunes = misfortunes or {}
    return [
        server.call(_rank, rank, config, together, folder, misfortunes.get(rank), log=folder / f"rank{rank}.log")
        for rank in (0, 1)
    ]


def start_under_torchrun(server, config, overrides, folder, misfortune=None):
    """Start `torchrun --nproc-per-node 2 --max-restarts 1 -m fairseq_cli.hydra_train` on a recipe.

    All processes write to folder/log. torchrun forks the ranks, which saves their imports.

    Args:
        server: a ForkServer.
        misfortune: a function that torchrun's process calls, whose changes the ranks inherit; see below.
    """
    arguments = [
        *overrides,
        f"common.user_dir={ROOT}/fairseq_stack",
        f"hydra.output_subdir={folder}/.hydra",
        f"hydra.job_logging.handlers.file.filename={folder}/train.log",
    ]
    return server.call(_torchrun, config, arguments, misfortune, log=folder / "log")


def start_submitted(server, config, overrides, folder):
    """Start `fairseq-hydra-train --multirun` on a recipe, which submits a job to this machine and waits for its end.

    The job writes to folder/.submitit/JOB/JOB_0_log.out and JOB_0_log.err, hydra to folder/log.
    """
    folder.mkdir(exist_ok=True)
    submitted = [
        *overrides,
        "hydra/launcher=submitit_local",
        f"hydra.sweep.dir={folder}",
        f"common.user_dir={ROOT}/fairseq_stack",
    ]
    return server.call(_submit, config, submitted, log=folder / "log")


def wait(processes):
    """Exit codes of the processes; one that does not end within a minute is stopped and gives None."""
    codes = []
    for process in processes:
        process.join(timeout=60)
        codes.append(process.exitcode)
        process.kill()
    return codes


def _rank(rank, config, overrides, folder, misfortune):
    record(folder, rank)
    if misfortune is not None:
        misfortune()
    sys.argv = ["fairseq-hydra-train", "--config-dir", str(ROOT / "examples/interleaved"), "--config-name", config,
                *overrides, f"distributed_training.distributed_rank={rank}"]  # fmt: skip
    hydra_train.cli_main()


def _torchrun(config, overrides, misfortune):
    if misfortune is not None:
        misfortune()
    run.main(["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--start-method", "fork", "--run-path",
              hydra_train.__file__, "--config-dir", str(ROOT / "examples/interleaved"), "--config-name", config,
              *overrides])  # fmt: skip


def _submit(config, overrides):
    from submitit.core.core import Job

    Job._results_timeout_s = 0  # of the 15 s in which the result of a job that failed may still appear
    sys.argv = ["fairseq-hydra-train", "--multirun", "--config-dir", str(ROOT / "examples/interleaved"),
                "--config-name", config, *overrides]  # fmt: skip
    hydra_train.cli_main()


def record(folder, rank, setattr=setattr):
    """Save what rank R holds: its weights after the growth at update U in rankR-grownU.pt, its gradient in rankR-gradientU.pt."""
    grow, optimizer_step = SpeechDistillation.grow, SpeechDistillation.optimizer_step

    def grown(task, sample, model, criterion, optimizer, update_num, ema_model):
        grow(task, sample, model, criterion, optimizer, update_num, ema_model)
        torch.save(model.state_dict(), folder / f"rank{rank}-grown{update_num}.pt")

    def stepped(task, optimizer, model, update_num):
        named = {name.replace("module.", ""): value.grad for name, value in model.named_parameters()}
        gradient = {name: value for name, value in named.items() if value is not None}
        torch.save(gradient, folder / f"rank{rank}-gradient{update_num}.pt")
        optimizer_step(task, optimizer, model, update_num)

    setattr(SpeechDistillation, "grow", grown)
    setattr(SpeechDistillation, "optimizer_step", stepped)


# What can befall one process of a job


def signal_before(update, number):
    """Let this process get a signal, as from outside, when `update` begins."""
    _before(update, lambda model: os.kill(os.getpid(), number))


def kill_one_of_torchruns_before(update):
    """Let rank 1 die without a word when `update` begins. It is started again, meets the other one late, and stays alive."""
    new_group = torch.distributed.new_group

    def rank_1_at_start(start):
        return (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", str(start))

    def met(*args, **kwargs):
        time.sleep(rank_1_at_start(1))
        return new_group(*args, **kwargs)

    torch.distributed.new_group = met
    _before(update, lambda model: rank_1_at_start(0) and os.kill(os.getpid(), signal.SIGKILL))


def end_torchrun_before(update):
    """Let torchrun get a SIGTERM, as from outside, when `update` begins."""
    _before(update, lambda model: os.environ["RANK"] == "0" and os.kill(os.getppid(), signal.SIGTERM))


def damage_before(update):
    """Let a weight of this process's student alone leave the range of numbers when `update` begins."""

    def damage(model):
        with torch.no_grad():
            model.encoder.layers[0].fc1.bias[0] = float("inf")

    _before(update, damage)


def recover_late(seconds):
    """Let this process take its time before it looks for the newest whole checkpoint."""
    recover = fairseq_guards.recover

    def late(folder):
        time.sleep(seconds)
        return recover(folder)

    fairseq_guards.recover = late


def save_late(seconds, update):
    """Let this process get a SIGTERM when `update` begins, and take its time to write the checkpoint."""
    save = StudentTrainer.save_checkpoint

    def late(trainer, *args):
        time.sleep(seconds)
        return save(trainer, *args)

    StudentTrainer.save_checkpoint = late
    signal_before(update, signal.SIGTERM)


def _before(update, action):
    train_step = SpeechDistillation.train_step

    def befallen(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == update:
            action(model)
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    SpeechDistillation.train_step = befallen


# torch's own DDP, which fairseq's c10d backend wraps, and which fairseq does not start without a GPU


def train_under_torchs_ddp(rank, processes, port, overrides, folder):
    """Two updates on eight recordings, `processes` sharing them, with a growth between.

    Saves the weights before each update and its gradient.
    """
    cfg = configuration("librispeech_base", overrides)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(0)
    student, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    data = task.dataset("train")
    model = student
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
        model = DistributedDataParallel(student, find_unused_parameters=True)
    sample = task.with_targets(data.collater([data[index] for index in range(rank, 8, processes)]), student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for stage in (1, 2):
        student.grow_to(stage)
        weights = {name: value.clone() for name, value in student.state_dict().items()}
        optimizer.zero_grad()
        loss, _, _ = criterion(model, sample)
        (processes * loss).backward()  # DDP gives the mean over processes; fairseq multiplies in the same way
        gradient = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
        torch.save({"weights": weights, "gradient": gradient}, folder / f"{processes}-rank{rank}-stage{stage}.pt")
        optimizer.step()
    if processes > 1:
        torch.distributed.destroy_process_group()
