"""The kill test at length, for scripts/soak.sh; pytest does not collect it by itself."""

import os
import signal
import time

from fork_server import ForkServer
from killing import FAULTS, Killer


def test_hundreds_of_kills_and_faults_lose_nothing(speech, teacher_file, tmp_path):
    wanted, started = int(os.environ.get("SOAK_KILLS", 300)), time.monotonic()
    ways = [
        {},
        {"faults": FAULTS},
        {"number": signal.SIGTERM, "expected": 143},
    ]
    with ForkServer() as server:
        killers = [Killer(server, speech, teacher_file, tmp_path / f"{way}", seed=way) for way in range(len(ways))]
        number = 0
        while sum(killer.kills for killer in killers) < wanted:
            way = number % len(ways)
            killers[way].kill_until_finished(killers[way].new_run(f"run{number}"), **ways[way])
            number += 1
            kinds = ("kills", "resumes", "faults", "finished", "lost", "different")
            totals = {kind: sum(getattr(killer, kind) for killer in killers) for kind in kinds}
            print(
                "\r{kills} kills, {resumes} resumes, {faults} faults in checkpoints, {finished} runs finished,"
                " {lost} files lost, {different} with other weights".format(**totals)
                + f" ({(time.monotonic() - started) / 60:.1f} min)",
                end="",
                flush=True,
            )
    print()
    assert totals["lost"] == totals["different"] == 0
