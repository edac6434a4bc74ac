"""The benchmark's results as Markdown tables."""

from collections.abc import Iterable
from typing import Any

from fairseq_stack.benchmark.measure import DEPTHS, growing, with_first_epoch
from fairseq_stack.benchmark.ours import LIVE
from fairseq_stack.tables import markdown_table

# For each schedule, the speed-up by growing if the transformer layers were the only cost.
LIMITS = {name: DEPTHS[-1] / growing(dict(zip(DEPTHS, DEPTHS)), name) for name in ("equal", "prop")}


def benchmark_tables(result: dict[str, Any]) -> str:
    """Returns all tables. Cells of depths that did not fit into memory are empty, and a line for each case names them.

    Args:
        result: from `measure`.
    """
    cases = {name: _with_numbers(figures) for name, figures in result["cases"].items()}
    ours = {name: figures for name, figures in cases.items() if name not in result["baselines"]}
    sections = [_parts(cases, result["did_not_fit"])]
    if ours:
        sections.append(_growth(ours))
        sections += [_against(baseline, cases[baseline], ours) for baseline in result["baselines"]]
    missing = [(name, depths) for name, depths in result["did_not_fit"].items() if depths]
    if missing:
        sections.append(
            "\n".join(f"{name}: {_listed(depths)} layers did not fit into memory" for name, depths in missing)
        )
    return "\n\n".join(sections)


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _parts(cases, did_not_fit):
    parts = list({part: None for figures in cases.values() for depth in figures["parts"].values() for part in depth})
    header = ["seconds of an update", "layers", *parts, "update", "peak memory, GiB"]
    rows = []
    for name, figures in cases.items():
        for depth, seconds in figures["parts"].items():
            cells = [f"{seconds[part]:.3f}" if part in seconds else "" for part in parts]
            memory = f"{figures['peak_memory'] / 2**30:.2f}" if "peak_memory" in figures else ""
            rows.append([name, str(depth), *cells, f"{figures['update'][depth]:.3f}", memory])
        rows += [[name, str(depth), *[""] * (len(parts) + 2)] for depth in did_not_fit[name]]
    return markdown_table(header, rows)


def _growth(ours):
    limits = [f"{name} (limit {limit:.2f}x)" for name, limit in LIMITS.items()]
    header = ["speed-up by growing, against full depth", *limits, "seconds of a growth"]
    rows = []
    for name, figures in ours.items():
        ratios, seconds = ["" for _ in LIMITS], ""
        if _whole(figures):
            full = figures["update"][DEPTHS[-1]]
            ratios = [f"{full / growing(figures['update'], schedule):.2f}x" for schedule in LIMITS]
        if "growth" in figures:
            seconds = f"{figures['growth']:.3f}"
        rows.append([name, *ratios, seconds])
    return markdown_table(header, rows)


def _against(baseline, reference, ours):
    header = [f"updates per second against {baseline}", "full depth", "whole recipe", "peak memory"]
    rows = []
    full = reference["update"].get(DEPTHS[-1])
    for name, figures in ours.items():
        at_depth, recipe, memory = "", "", ""
        precision, targets, cnn = name.split(", ")
        live = ours.get(f"{precision}, {LIVE} targets, {cnn}")
        if full and DEPTHS[-1] in figures["update"]:
            at_depth = f"{full / figures['update'][DEPTHS[-1]]:.2f}x"
            if "peak_memory" in figures and "peak_memory" in reference:
                memory = f"{figures['peak_memory'] / reference['peak_memory']:.2f}x"
        if full and LIVE not in targets and _whole(figures) and live and DEPTHS[0] in live["update"]:
            recipe = f"{full / with_first_epoch(figures['update'], live['update']):.2f}x"
        rows.append([name, at_depth, recipe, memory])
    return markdown_table(header, rows)


def _whole(figures):
    return set(figures["update"]) == set(DEPTHS)


def _with_numbers(figures):
    """The figures of a case with depths as numbers, which are strings in JSON."""
    return {
        **figures,
        **{field: {int(depth): value for depth, value in figures[field].items()} for field in ("update", "parts")},
    }
