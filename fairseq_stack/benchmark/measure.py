"""Measures all cases and takes medians.

On a CPU the cases take turns, update by update, so that other processes slow down all of them equally. On a GPU, whose
memory does not hold all cases, they run one after another.
"""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from fairseq_stack.benchmark.baselines import BASELINES
from fairseq_stack.benchmark.inputs import make_inputs
from fairseq_stack.benchmark.ours import LIVE, Case, Ours, fill_store
from fairseq_stack.benchmark.workers import Killed, Maker, OutOfMemory, in_another_process, peak_memory, workers
from fairseq_stack.growth.schedule import stage_starts

DEPTHS = (3, 6, 9, 12)
EPOCHS = 75  # of the paper's recipe
UPDATES = 100_000  # of the recipe for which `growing` is computed; the result hardly depends on it


def measure(
    recipes: Path,
    size: str,
    batch: int,
    seconds: float,
    rounds: int,
    device: str,
    cases: Sequence[Case],
    baselines: Sequence[str],
    threads: int,
) -> dict[str, Any]:
    """Returns the seconds of an update for every case, depth and part.

    Args:
        recipes: folder of the recipe `librispeech_base`.
        size: of inputs.SIZES.
        batch: utterances of an update.
        seconds: length of each utterance.
        rounds: measured updates of each case at each depth; one more update before them warms up.
        device: cpu or cuda.
        cases: of our training.
        baselines: names in BASELINES.
        threads: of each training, on a CPU.

    Returns:
        plain values, as `fairseq-stack benchmark` writes them.
    """
    ours = {str(case): case for case in cases}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, size, seconds, utterances=batch * (rounds + 1) * len(DEPTHS))
        makers: dict[str, Maker] = {
            name: (Ours, recipes, folder, size, batch, device, case) for name, case in ours.items()
        }
        makers.update({name: (BASELINES[name], folder, size, batch, seconds, device) for name in baselines})
        # One store for all precisions
        stores = {(case.targets, case.cnn): case for case in reversed(cases) if case.targets != LIVE}
        for store, case in stores.items():
            try:
                in_another_process(threads, fill_store, recipes, folder, size, batch, device, case)
            except OutOfMemory:  # the teacher does not fit
                for name, other in ours.items():
                    if (other.targets, other.cnn) == store:
                        makers.pop(name)
        names = [*ours, *baselines]
        depths = {name: DEPTHS if name in ours else DEPTHS[-1:] for name in names}
        measured = measure_each(threads, makers, depths, rounds, one_by_one=device == "cuda")
    unmeasured = {"update": {}, "parts": {}}
    found = {name: measured.get(name, unmeasured) for name in names}
    return {
        "cases": found,
        "did_not_fit": {
            name: [depth for depth in depths[name] if depth not in found[name]["update"]] for name in found
        },
        "baselines": list(baselines),
        "rounds": rounds,
    }


def cases_of(precisions: Sequence[str], cnns: Sequence[str], targets: Sequence[str]) -> list[Case]:
    """Returns the Cases of all combinations of these values of their attributes."""
    ways = itertools.product(precisions, cnns, targets)
    return [Case(precision, source, cnn) for precision, cnn, source in ways]


def measure_each(
    threads: int, makers: Mapping[str, Maker], depths: Mapping[str, Sequence[int]], rounds: int, one_by_one: bool
) -> dict[str, dict[str, Any]]:
    """Measures trainings, each in its own process. Only one process computes at a time.

    If a training runs out of memory at a depth, its results for this depth are dropped, and neither this depth nor a
    deeper one is tried again.

    Args:
        threads: of each training.
        makers: {name: (make, *arguments)}. `make` returns an object with the methods of Ours; with a single depth, it
            needs no `growth`.
        depths: {name: ascending depths}.
        rounds: see `measure`.
        one_by_one: whether a training ends before the next one starts, so that it has the whole memory. Otherwise they
            take turns, update by update.

    Returns:
        {name: {"update": {depth: seconds}, "parts": {depth: {part: seconds}}, "peak_memory": bytes,
        "growth": seconds}}: medians over the rounds, for the depths that fit. Memory and growth are there only if all
        depths fit.
    """
    if one_by_one:
        alone = [measure_each(threads, {name: makers[name]}, depths, rounds, one_by_one=False) for name in makers]
        return {name: figures for measured in alone for name, figures in measured.items()}
    spent: dict[str, dict[int, list]] = {name: {depth: [] for depth in depths[name]} for name in makers}
    growths = {name: [] for name in makers}
    with workers(threads, makers) as (running, without):

        def ask(name, depth, *call):
            try:
                return running[name].call(*call)
            except OutOfMemory as error:
                spent[name] = {other: kept for other, kept in spent[name].items() if other < depth}
                if isinstance(error, Killed):
                    running.pop(name).close()

        for name in without:
            spent[name] = {}
        for number in tqdm(range(rounds + 1), desc=" ".join(makers) if len(makers) == 1 else "rounds"):
            for depth in sorted({depth for name in makers for depth in depths[name]}):
                for name in [name for name in running if depth in spent[name]]:
                    parts = ask(name, depth, "update", depth)
                    if number and parts is not None:
                        spent[name][depth].append(parts)
            for name in list(running) if number else ():
                deepest = depths[name][-1]
                if len(depths[name]) > 1 and deepest in spent[name]:
                    growths[name].append(ask(name, deepest, "growth"))
        # After a training ran out of memory, its peak is that of an update that was dropped.
        memory = {name: running[name].run(peak_memory) for name in running if len(spent[name]) == len(depths[name])}
    return {
        name: {
            "update": {
                depth: median(sum(one.values()) for one in found) for depth, found in spent[name].items() if found
            },
            "parts": {depth: _medians(found) for depth, found in spent[name].items() if found},
            **({"peak_memory": memory[name]} if name in memory else {}),
            **({"growth": median(growths[name])} if growths[name] and depths[name][-1] in spent[name] else {}),
        }
        for name in makers
    }


def _medians(measured):
    """{part: median} of a list of {part: seconds}."""
    names = {part: None for parts in measured for part in parts}
    return {name: median(parts.get(name, 0.0) for parts in measured) for name in names}


def growing(seconds: Mapping[int, float], schedule: str) -> float:
    """Returns the mean seconds of an update of a student that grows.

    Args:
        seconds: {depth: seconds of an update}, in ascending order.
        schedule: its name, see stage_starts.
    """
    starts = [*stage_starts(schedule, len(seconds), UPDATES), UPDATES]
    return sum((end - begin) / UPDATES * seconds[depth] for depth, begin, end in zip(seconds, starts, starts[1:]))


def with_first_epoch(stored: Mapping[int, float], live: Mapping[int, float]) -> float:
    """Returns the mean seconds of an update of the paper's recipe (PROP-1, 75 epochs) with stored targets.

    The first epoch, which is within the first stage, computes the targets and stores them.

    Args:
        stored, live: {depth: seconds of an update}.
    """
    shallow = min(stored)
    return growing(stored, "prop") + (live[shallow] - stored[shallow]) / EPOCHS
