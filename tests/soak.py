"""The kill test at length, for scripts/soak.sh; pytest does not collect it by itself."""

import os
import signal
import time

from fork_server import ForkServer
from killing import FAULTS, Killer

# Processes that load data, and how a run is interrupted.
WAYS = [
    (0, {}),
    (0, {"faults": FAULTS}),
    (2, {"faults": FAULTS}),
    (0, {"number": signal.SIGTERM, "expected": 143}),
]
COUNTS = ("kills", "resumes", "faults", "finished", "lost", "different")


def test_hundreds_of_kills_and_faults_lose_nothing(speech, teacher_file, tmp_path):
    wanted, started = int(os.environ.get("SOAK_KILLS", 300)), time.monotonic()
    with ForkServer() as server:
        killers = [
            Killer(server, speech, teacher_file, tmp_path / f"{way}", seed=way, workers=workers)
            for way, (workers, _) in enumerate(WAYS)
        ]
        runs = 0
        while sum(killer.kills for killer in killers) < wanted:
            way = runs % len(WAYS)
            killers[way].kill_until_finished(killers[way].new_run(f"run{runs}"), **WAYS[way][1])
            runs += 1
            total = {name: sum(getattr(killer, name) for killer in killers) for name in COUNTS}
            print(
                f"\r{total['kills']} kills ({killers[-1].kills} by SIGTERM), {total['resumes']} resumes,"
                f" {total['faults']} faults in checkpoints, {total['finished']} runs finished,"
                f" {total['lost']} files lost, {total['different']} with other weights"
                f" ({(time.monotonic() - started) / 60:.1f} min)",
                end="",
                flush=True,
            )
    print()
    assert total["lost"] == total["different"] == 0
