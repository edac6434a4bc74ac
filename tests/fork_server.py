"""Start trainings in a fraction of a second: a process imports everything once and forks one for each.

As a program: every line on stdin is a job in JSON, {"config", "overrides", "log", "kill_at_event"};
its process id and later its exit code (negative: the signal) are printed. As a module: ForkServer
runs that program.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


class ForkServer:
    """Use as a context manager."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, config, overrides, log, kill_at_event=None):
        """Start a training in a process group of its own; returns its process id."""
        Path(log).touch()
        job = {"config": config, "overrides": overrides, "log": str(log), "kill_at_event": kill_at_event}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit code of what was started last."""
        return int(self.process.stdout.readline())

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


def _serve():
    # The process that tests run in knows where conftest.py and the package are.
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import torch
    import torch._dynamo  # which the first optimiser imports, for a second or two
    from fairseq_cli import hydra_train  # noqa: F401
    from training import train

    import fairseq_stack.criterions
    import fairseq_stack.models
    import fairseq_stack.tasks
    import fairseq_stack.teachers.fairseq_checkpoint  # noqa: F401

    torch.set_num_threads(1)  # a fork has no threads but its own
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 1
            try:
                if job["kill_at_event"]:
                    folder = next(each for each in job["overrides"] if each.startswith("checkpoint.save_dir="))
                    _kill_at_event(job["kill_at_event"], folder.partition("=")[2])
                train(job["config"], job["overrides"])
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
                print(ended.code, flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        try:
            os.setpgid(pid, pid)  # whoever is first
        except PermissionError:
            pass
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
