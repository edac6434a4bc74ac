"""The benchmark's figures as Markdown."""

from fairseq_stack.benchmark.measure import DEPTHS, growing, with_first_epoch

# Part of the time of an update that training at depths 3, 6, 9 and 12 takes if only the layers cost anything.
LIMITS = {name: DEPTHS[-1] / growing(dict(zip(DEPTHS, DEPTHS)), name) for name in ("equal", "prop")}


def tables(result):
    """All tables, as text."""
    cases = {name: _with_numbers(figures) for name, figures in result["cases"].items()}
    ours = {name: figures for name, figures in cases.items() if name not in result["peers"]}
    sections = [_parts(cases), _growth(ours)]
    sections += [_against(peer, cases[peer], ours) for peer in result["peers"]]
    return "\n\n".join(sections)


def _parts(cases):
    parts = list({part: None for figures in cases.values() for depth in figures["parts"].values() for part in depth})
    lines = _head("seconds of an update", "layers", *parts, "update", "peak memory, GiB")
    for name, figures in cases.items():
        for depth, seconds in figures["parts"].items():
            cells = [f"{seconds[part]:.3f}" if part in seconds else "" for part in parts]
            lines.append(_row(name, depth, *cells, f"{figures['update'][depth]:.3f}", f"{figures['peak_memory'] / 2**30:.2f}"))
    return "\n".join(lines)


def _growth(ours):
    limits = [f"{name} (limit {limit:.2f}x)" for name, limit in LIMITS.items()]
    lines = _head("speed-up by growing, against full depth", *limits, "seconds of a growth")
    for name, figures in ours.items():
        full = figures["update"][DEPTHS[-1]]
        ratios = [f"{full / growing(figures['update'], schedule):.2f}x" for schedule in LIMITS]
        lines.append(_row(name, *ratios, f"{figures['growth']:.3f}"))
    return "\n".join(lines)


def _against(peer, reference, ours):
    full = reference["update"][DEPTHS[-1]]
    lines = _head(f"updates per second against {peer}", "full depth", "whole recipe", "peak memory")
    for name, figures in ours.items():
        recipe = ""
        if "stored" in name:
            live = ours[name.replace("stored", "live")]["update"]
            recipe = f"{full / with_first_epoch(figures['update'], live):.2f}x"
        memory = figures["peak_memory"] / reference["peak_memory"]
        lines.append(_row(name, f"{full / figures['update'][DEPTHS[-1]]:.2f}x", recipe, f"{memory:.2f}x"))
    return "\n".join(lines)


def _with_numbers(figures):
    """JSON makes strings of the depths."""
    return {
        **figures,
        **{field: {int(depth): value for depth, value in figures[field].items()} for field in ("update", "parts")},
    }


def _head(*titles):
    return [_row(*titles), _row("---", *["---:"] * (len(titles) - 1))]


def _row(*cells):
    return f"| {' | '.join(map(str, cells))} |"
