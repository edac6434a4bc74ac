"""Kill a small training at random moments and let it go on, for the tests and for scripts/soak.sh."""

import math
import random
import re
import shutil
import signal
import time
from pathlib import Path

import torch
from training import tiny

EVENTS = 60  # file operations of about four updates, which each save twice and copy


class Killer:
    """Runs of 20 updates through all growths, with a checkpoint at every update.

    Args:
        server: a ForkServer.
        speech, teacher_file, folder: where things are.
        seed: of the kills.
        workers: processes that load data.
        reference: a Killer whose uninterrupted run is that of these runs, too (default: make one).

    Attributes:
        kills, resumes, faults, finished: counts.
        lost: starts that went on from an earlier update than the newest whole checkpoint's.
        different: finished runs whose model or optimiser differs from the uninterrupted run's.
    """

    def __init__(self, server, speech, teacher_file, folder, seed, workers=0, reference=None):
        self.server, self.speech, self.teacher_file, self.folder = server, speech, teacher_file, Path(folder)
        self.workers = workers
        self.random = random.Random(seed)
        self.kills = self.resumes = self.faults = self.finished = self.lost = self.different = 0
        if reference is not None:
            self.reference, self.seconds = reference.reference, reference.seconds
            return
        started = time.monotonic()
        self.reference = self.new_run("reference")
        assert self.start(self.reference) == 0, self.log(self.reference)
        self.seconds = time.monotonic() - started

    def new_run(self, name):
        run = self.folder / name
        run.mkdir(parents=True)
        return run

    def start(self, run, **kill):
        """Start the same command again; returns its exit code."""
        fields = {"checkpoint.save_interval_updates": 1, "dataset.num_workers": self.workers}
        overrides = tiny(self.speech, self.teacher_file, run, **fields)
        return self.server.run("librispeech_base", overrides, run / "log", **kill)

    def log(self, run):
        return (run / "log").read_text()

    def kill_until_finished(
        self, run, faults=(), fault_rate=0.5, number=signal.SIGKILL, expected=-signal.SIGKILL, most=math.inf
    ):
        """Kill and resume a run until it ends; compare it with the uninterrupted one.

        Args:
            run: its folder.
            faults: of FAULTS, with which checkpoint_last.pt is damaged between two starts.
            fault_rate: how often.
            number, expected: the signal and the exit code that it leads to.
            most: kills, or with `faults` damages, behind which the run is left to end.
        """
        code, patience = None, 0.4 * self.seconds
        before = self.faults if faults else self.kills
        while code != 0:
            self.resumes += code is not None
            if (self.faults if faults else self.kills) - before >= most:
                kill = {}
            elif number == signal.SIGKILL and self.random.random() < 0.5:
                kill = {"kill_at_event": self.random.randrange(1, EVENTS)}
            else:
                kill = {"signal_after": self.random.uniform(0, patience), "number": number}
                patience *= 1.05  # a machine that has become slow gets on all the same
            code = self.start(run, **kill)
            # SIGTERM before the program listens is an end like any other, with nothing to save.
            assert code in (0, expected, -number), self.log(run)
            self.kills += code != 0
            if faults and code and self.random.random() < fault_rate:
                self.damage(run, self.random.choice(faults))
        self.finished += 1
        self.lost += lost_checkpoints(self.log(run))
        self.different += not same_state(run, self.reference)
        shutil.rmtree(run / "checkpoints")

    def damage(self, run, fault):
        """Damage checkpoint_last.pt, and note in the log what is left."""
        last = run / "checkpoints/checkpoint_last.pt"
        if last.exists():
            self.faults += 1
            fault(last, self.random)
            left = [path.stem.split("_")[2] for path in last.parent.glob("checkpoint_*_*.pt")]
            with open(run / "log", "a") as log:
                log.write(
                    f"damage to checkpoint_last.pt: {fault.__name__}, left are {max(map(int, left), default=0)} updates\n"
                )


def cut_off(path, chosen):
    """As a kill leaves a copy in place, or a full disk."""
    with open(path, "r+b") as file:
        file.truncate(chosen.randrange(path.stat().st_size))


def flipped(path, chosen):
    """As a failing disk leaves it."""
    content = bytearray(path.read_bytes())
    for _ in range(100):
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)


def removed(path, chosen):
    path.unlink()


def unfinished(path, chosen):
    """As a kill leaves what torch is writing."""
    content = path.read_bytes()
    path.with_name("checkpoint_9_99.pt.tmp").write_bytes(content[: chosen.randrange(len(content))])


FAULTS = (cut_off, flipped, removed, unfinished)


def lost_checkpoints(log):
    """How many starts went on from an earlier update than the newest one that had been saved and was left whole."""
    writing, saved, lost = 0, 0, 0
    for line in log.splitlines():
        if found := re.search(r"Preparing to save checkpoint for epoch \d+ @ (\d+) updates", line):
            writing = int(found[1])
        elif "Finished saving checkpoint to" in line:
            saved = writing
        elif found := re.search(r"damage to checkpoint_last.pt: \w+, left are (\d+) updates", line):
            saved = int(found[1])
        elif found := re.search(r"Loaded checkpoint \S+ \(epoch \d+ @ (\d+) updates\)", line):
            lost += int(found[1]) < saved
        elif "No existing checkpoint found" in line:
            lost += saved > 0
    return lost


def same_state(run, reference):
    """Whether two finished runs have the same weights and moments, bit for bit."""
    ours, theirs = (
        torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=True) for folder in (run, reference)
    )
    return all(_same(ours[name], theirs[name]) for name in ("model", "last_optimizer_state"))


def _same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other
