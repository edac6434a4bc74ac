"""Measure all cases in turn, round after round, and take medians, so that what the machine does meanwhile meets all."""

import tempfile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from fairseq_stack.benchmark.inputs import make_inputs
from fairseq_stack.benchmark.ours import Case, Ours, fill_store
from fairseq_stack.benchmark.peers import PEERS
from fairseq_stack.benchmark.workers import in_another_process, workers
from fairseq_stack.growth.schedule import stage_starts

DEPTHS = (3, 6, 9, 12)
EPOCHS = 75  # of the paper's recipe
UPDATES = 100_000  # of a recipe whose schedules are reckoned up; its number does not matter


def measure(recipes, size, batch, seconds, rounds, device, precisions, peers, threads):
    """Seconds of an update for every case, depth and part.

    Args:
        recipes: folder of the recipe `librispeech_base`.
        size: of inputs.SIZES.
        batch: utterances of an update.
        seconds: length of each.
        rounds: updates measured of each case at each depth; one more comes first and warms up.
        device: cpu or cuda.
        precisions: of our students.
        peers: names of PEERS.
        threads: of each training, on a CPU.

    Returns:
        a dict of plain values, as `scripts/benchmark.py` writes it.
    """
    cases = {
        str(case): case
        for precision in precisions
        for cnn in ("trained", "shared")
        for targets in ("live", "stored")
        for case in [Case(precision, targets, cnn)]
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, size, seconds, utterances=batch * (rounds + 1) * len(DEPTHS))
        for cnn in ("trained", "shared"):
            case = Case(precisions[0], "stored", cnn)
            in_another_process(threads, fill_store, recipes, folder, size, batch, device, case)
        makers = {name: (Ours, recipes, folder, size, batch, device, case) for name, case in cases.items()}
        makers.update({name: (PEERS[name], folder, size, batch, seconds, device) for name in peers})
        with workers(threads, makers) as running:
            return _measured(running, cases, peers, rounds)


def _measured(running, cases, peers, rounds):
    depths = {name: DEPTHS if name in cases else DEPTHS[-1:] for name in running}
    spent = {name: {depth: [] for depth in depths[name]} for name in running}
    growths = {name: [] for name in cases}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for depth in DEPTHS:
            for name, worker in running.items():
                if depth in depths[name]:
                    parts = worker.call("update", depth)
                    if number:
                        spent[name][depth].append(parts)
        if number:
            for name in cases:
                growths[name].append(running[name].call("growth"))
    return {
        "cases": {
            name: {
                "update": {depth: median(sum(parts.values()) for parts in spent[name][depth]) for depth in depths[name]},
                "parts": {depth: _medians(spent[name][depth]) for depth in depths[name]},
                "peak_memory": running[name].call("peak_memory"),
                **({"growth": median(growths[name])} if name in cases else {}),
            }
            for name in running
        },
        "peers": list(peers),
        "rounds": rounds,
    }


def _medians(measured):
    """{part: median} of a list of {part: seconds}."""
    names = {part: None for parts in measured for part in parts}
    return {name: median(parts.get(name, 0.0) for parts in measured) for name in names}


def growing(seconds, schedule):
    """Mean seconds of an update while the student grows, of {depth: seconds of an update}, for a schedule's name."""
    starts = [*stage_starts(schedule, len(seconds), UPDATES), UPDATES]
    return sum((end - begin) / UPDATES * seconds[depth] for depth, begin, end in zip(seconds, starts, starts[1:]))


def with_first_epoch(stored, live):
    """Mean seconds of an update of the paper's recipe (PROP-1, 75 epochs) that stores its targets in the first epoch.

    Args:
        stored, live: {depth: seconds of an update}. The first epoch lies in the first stage.
    """
    shallow = min(stored)
    return growing(stored, "prop") + (live[shallow] - stored[shallow]) / EPOCHS
