"""The benchmark's figures as Markdown."""

from fairseq_stack.benchmark.measure import DEPTHS, growing, with_first_epoch

# Part of the time of an update that training at depths 3, 6, 9 and 12 takes if only the layers cost anything.
LIMITS = {name: DEPTHS[-1] / growing(dict(zip(DEPTHS, DEPTHS)), name) for name in ("equal", "prop")}


def tables(result):
    """All tables, as text. Cells of what did not fit into memory are empty, and a line for each case says so."""
    cases = {name: _with_numbers(figures) for name, figures in result["cases"].items()}
    ours = {name: figures for name, figures in cases.items() if name not in result["peers"]}
    sections = [_parts(cases, result["did_not_fit"]), _growth(ours)]
    sections += [_against(peer, cases[peer], ours) for peer in result["peers"]]
    missing = [(name, depths) for name, depths in result["did_not_fit"].items() if depths]
    if missing:
        sections.append("\n".join(f"{name}: {_listed(depths)} layers did not fit into memory" for name, depths in missing))
    return "\n\n".join(sections)


def _listed(numbers):
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _parts(cases, did_not_fit):
    parts = list({part: None for figures in cases.values() for depth in figures["parts"].values() for part in depth})
    lines = table_head("seconds of an update", "layers", *parts, "update", "peak memory, GiB")
    for name, figures in cases.items():
        for depth, seconds in figures["parts"].items():
            cells = [f"{seconds[part]:.3f}" if part in seconds else "" for part in parts]
            memory = f"{figures['peak_memory'] / 2**30:.2f}" if "peak_memory" in figures else ""
            lines.append(table_row(name, depth, *cells, f"{figures['update'][depth]:.3f}", memory))
        lines += [table_row(name, depth, *[""] * (len(parts) + 2)) for depth in did_not_fit[name]]
    return "\n".join(lines)


def _growth(ours):
    limits = [f"{name} (limit {limit:.2f}x)" for name, limit in LIMITS.items()]
    lines = table_head("speed-up by growing, against full depth", *limits, "seconds of a growth")
    for name, figures in ours.items():
        ratios, seconds = ["" for _ in LIMITS], ""
        if _whole(figures):
            full = figures["update"][DEPTHS[-1]]
            ratios = [f"{full / growing(figures['update'], schedule):.2f}x" for schedule in LIMITS]
        if "growth" in figures:
            seconds = f"{figures['growth']:.3f}"
        lines.append(table_row(name, *ratios, seconds))
    return "\n".join(lines)


def _against(peer, reference, ours):
    lines = table_head(f"updates per second against {peer}", "full depth", "whole recipe", "peak memory")
    full = reference["update"].get(DEPTHS[-1])
    for name, figures in ours.items():
        at_depth, recipe, memory = "", "", ""
        live = ours.get(name.replace("stored", "live"), figures)
        if full and DEPTHS[-1] in figures["update"]:
            at_depth = f"{full / figures['update'][DEPTHS[-1]]:.2f}x"
            if "peak_memory" in figures and "peak_memory" in reference:
                memory = f"{figures['peak_memory'] / reference['peak_memory']:.2f}x"
        if full and "stored" in name and _whole(figures) and DEPTHS[0] in live["update"]:
            recipe = f"{full / with_first_epoch(figures['update'], live['update']):.2f}x"
        lines.append(table_row(name, at_depth, recipe, memory))
    return "\n".join(lines)


def _whole(figures):
    return set(figures["update"]) == set(DEPTHS)


def _with_numbers(figures):
    """JSON makes strings of the depths."""
    return {
        **figures,
        **{field: {int(depth): value for depth, value in figures[field].items()} for field in ("update", "parts")},
    }


def table_head(*titles):
    """The first two lines of a Markdown table; all columns but the first are numbers."""
    return [table_row(*titles), table_row("---", *["---:"] * (len(titles) - 1))]


def table_row(*cells):
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
