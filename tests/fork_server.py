"""Start trainings in a fraction of a second: a process imports everything once and forks one for each."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # which the first optimiser imports, for a second or two
from fairseq_cli import hydra_train
from training import ROOT, train

import fairseq_stack.tasks.registration
import fairseq_stack.teachers.fairseq_checkpoint  # noqa: F401

_context = multiprocessing.get_context("forkserver")


class ForkServer:
    """Use as a context manager, which ends what is still running."""

    def __init__(self):
        self.processes = []

    def __enter__(self):
        # A process has one such server. The preparation of speech may have started it, with imports of its own. It
        # ends by itself once nobody holds its pipe, which data workers of a training in this process may still do.
        server = forkserver._forkserver
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop()
        _context.set_forkserver_preload(["fork_server"])
        self.call(int, log=os.devnull).join()  # the first call waits for the imports
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()

    def call(self, function, *arguments, log):
        """Start a process, in a group of its own, that calls a function of a module in tests/.

        Its output goes to the end of the file `log`. Returns a multiprocessing.Process.
        """
        Path(log).touch()
        # For the process that imports, which the first call of all starts.
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}/tests{os.pathsep}{ROOT}", OMP_NUM_THREADS="1"):
            process = _context.Process(target=_call, args=(function, arguments, log))
            process.start()
        self.processes.append(process)
        with suppress(ProcessLookupError):  # it may have ended
            while os.getpgid(process.pid) != process.pid:
                time.sleep(0.001)
        return process

    def start(self, config, overrides, log, kill_at_event=None):
        """Start a training; returns its process id."""
        return self.call(_train, config, overrides, kill_at_event, log=log).pid

    def start_command(self, arguments, log):
        """Start `fairseq-hydra-train` with the arguments that a user would type; returns its process id."""
        return self.call(_command, arguments, log=log).pid

    def command(self, arguments, log):
        """Run `fairseq-hydra-train` with the arguments that a user would type; returns its exit code."""
        self.start_command(arguments, log)
        return self.wait()

    def wait(self):
        """The exit code (negative: the signal) of what was started last."""
        self.processes[-1].join()
        return self.processes[-1].exitcode

    def run(self, config, overrides, log, kill_at_event=None, signal_after=None, number=signal.SIGKILL):
        """Start a training, signal its process group after some seconds, and return its exit code."""
        pid = self.start(config, overrides, log, kill_at_event)
        if signal_after is not None:
            time.sleep(signal_after)
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it was faster
                pass
        return self.wait()


def _call(function, arguments, log):
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers: what it is in a process of its own
    function(*arguments)


def _train(config, overrides, kill_at_event):
    if kill_at_event:
        folder = next(each for each in overrides if each.startswith("checkpoint.save_dir="))
        _kill_at_event(kill_at_event, folder.partition("=")[2])
    train(config, overrides)


def _command(arguments):
    sys.argv = ["fairseq-hydra-train", *map(str, arguments)]
    hydra_train.cli_main()


def _kill_at_event(event, folder):
    """SIGKILL this process before its `event`-th opening, renaming or removal of a file in `folder`."""
    left = event

    def audit(name, arguments):
        nonlocal left
        if name in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
