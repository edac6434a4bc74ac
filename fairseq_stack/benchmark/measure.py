"""Measure all cases and take medians.

On a CPU they take turns, update by update, so that what else the machine does meanwhile meets all. On a GPU, whose
memory would not hold all, they come one after another.
"""

import itertools
import tempfile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from fairseq_stack.benchmark.baselines import BASELINES
from fairseq_stack.benchmark.inputs import make_inputs
from fairseq_stack.benchmark.ours import Case, Ours, fill_store
from fairseq_stack.benchmark.workers import Killed, OutOfMemory, in_another_process, peak_memory, workers
from fairseq_stack.growth.schedule import stage_starts

DEPTHS = (3, 6, 9, 12)
EPOCHS = 75  # of the paper's recipe
UPDATES = 100_000  # of a recipe whose schedules are reckoned up; its number does not matter


def measure(recipes, size, batch, seconds, rounds, device, precisions, baselines, threads):
    """Seconds of an update for every case, depth and part.

    Args:
        recipes: folder of the recipe `librispeech_base`.
        size: of inputs.SIZES.
        batch: utterances of an update.
        seconds: length of each.
        rounds: updates measured of each case at each depth; one more comes first and warms up.
        device: cpu or cuda.
        precisions: of our students.
        baselines: names of BASELINES, to compare with.
        threads: of each training, on a CPU.

    Returns:
        a dict of plain values, as `fairseq-stack benchmark` writes it.
    """
    cases = {str(case): case for case in cases_of(precisions)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, size, seconds, utterances=batch * (rounds + 1) * len(DEPTHS))
        makers = {name: (Ours, recipes, folder, size, batch, device, case) for name, case in cases.items()}
        makers.update({name: (BASELINES[name], folder, size, batch, seconds, device) for name in baselines})
        for cnn in ("trained", "shared"):
            case = Case(precisions[0], "stored", cnn)
            try:
                in_another_process(threads, fill_store, recipes, folder, size, batch, device, case)
            except OutOfMemory:  # of the teacher
                makers = {name: maker for name, maker in makers.items() if not _needs_store(cases.get(name), cnn)}
        names = [*cases, *baselines]
        depths = {name: DEPTHS if name in cases else DEPTHS[-1:] for name in names}
        measured = measure_each(threads, makers, depths, rounds, one_by_one=device == "cuda")
    nothing = {"update": {}, "parts": {}}
    found = {name: measured.get(name, nothing) for name in names}
    return {
        "cases": found,
        "did_not_fit": {
            name: [depth for depth in depths[name] if depth not in found[name]["update"]] for name in found
        },
        "baselines": list(baselines),
        "rounds": rounds,
    }


def cases_of(precisions):
    """All ways to train in these precisions, as a list of Cases."""
    ways = itertools.product(precisions, ("trained", "shared"), ("live", "stored"))
    return [Case(precision, targets, cnn) for precision, cnn, targets in ways]


def _needs_store(case, cnn):
    return case is not None and (case.targets, case.cnn) == ("stored", cnn)


def measure_each(threads, makers, depths, rounds, one_by_one):
    """Measure trainings in processes of their own, of which one computes at any time.

    Where memory runs out at a depth, nothing is kept of this depth of the training, and it is not asked for it or a
    deeper one again.

    Args:
        threads: of each.
        makers: {name: (make, *arguments)}; `make` gives something with the methods of Ours, without `growth` for one
            that has a single depth.
        depths: {name: ascending depths}.
        rounds: see `measure`.
        one_by_one: finish a training and end its process before the next one starts, so that it has the memory to
            itself; else they take turns, update by update.

    Returns:
        {name: {"update": {depth: seconds}, "parts": {depth: {part: seconds}}, "peak_memory": bytes,
        "growth": seconds}}, medians over the rounds, of the depths that fit; memory and growth only where all do.
    """
    if one_by_one:
        alone = [measure_each(threads, {name: makers[name]}, depths, rounds, one_by_one=False) for name in makers]
        return {name: figures for measured in alone for name, figures in measured.items()}
    spent = {name: {depth: [] for depth in depths[name]} for name in makers}
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
        # A peak that was reached where memory ran out is that of an update that does not count.
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
