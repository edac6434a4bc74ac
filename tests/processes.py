"""Start the processes of one job as a cluster's launcher does, each with fairseq's command.

They are forked from a process that has imported everything once.
"""

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from fairseq import tasks
from fairseq_cli import hydra_train
from torch.nn.parallel import DistributedDataParallel
from training import configuration

from fairseq_stack.tasks.speech_distillation import SpeechDistillation

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["processes"])


def start(target, *arguments):
    """Start a process that calls `target`; both must be found by their name in a module of tests/."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])  # for the preload
    try:
        process = _context.Process(target=target, args=arguments)
        process.start()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return process


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_job(config, overrides, folder, kill_at=None):
    """Start the two ranks of `fairseq-hydra-train` on a recipe; rank 1 is killed before update `kill_at`.

    Each rank writes its output to folder/rank0.log or rank1.log, and what `record` does.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    together = [
        f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
        "distributed_training.distributed_world_size=2",
        "distributed_training.distributed_no_spawn=true",
        "distributed_training.distributed_backend=gloo",
        f"common.user_dir={ROOT}/fairseq_stack",
        f"hydra.output_subdir={folder}/.hydra",
        f"hydra.job_logging.handlers.file.filename={folder}/train.log",
    ]
    return [
        start(_rank, rank, config, [*overrides, *together], folder, kill_at if rank == 1 else None) for rank in (0, 1)
    ]


def wait(processes):
    """Exit codes of the processes; one that does not end within a minute is stopped and gives None."""
    codes = []
    for process in processes:
        process.join(timeout=60)
        codes.append(process.exitcode)
        process.kill()
    return codes


def _rank(rank, config, overrides, folder, kill_at):
    with open(folder / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    record(folder, rank)
    if kill_at is not None:
        kill_before(kill_at)
    sys.argv = ["fairseq-hydra-train", "--config-dir", str(ROOT / "examples/interleaved"), "--config-name", config,
                *overrides, f"distributed_training.distributed_rank={rank}"]  # fmt: skip
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


def kill_before(update):
    """Let this process end as if it were killed from outside, when `update` begins."""
    train_step = SpeechDistillation.train_step

    def killed(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    SpeechDistillation.train_step = killed


def gradients_by_torch(rank, processes, port, overrides, folder):
    """Save the gradient on eight recordings, `processes` sharing them under torch's DDP, before and after a growth."""
    torch.set_num_threads(1)
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
    for stage in (1, 2):
        student.grow_to(stage)
        student.zero_grad()
        loss, _, _ = criterion(model, sample)
        loss.backward()
        gradient = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
        torch.save(gradient, folder / f"{processes}-rank{rank}-stage{stage}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()
