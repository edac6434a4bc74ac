"""The results of an experiment as a table and figures."""

import math
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fairseq_stack.analysis.intervals import mean_and_interval
from fairseq_stack.analysis.objective import Kind, describe_kinds, kinds_of
from fairseq_stack.analysis.plots import COLOURS, STYLE
from fairseq_stack.experiment.measures import time_to_reach
from fairseq_stack.tables import markdown_table


def summary_table(results: dict[str, Any]) -> str:
    """Returns a Markdown table: one row for each student, means with a 95 % interval over the seeds.

    Students are compared with the reference seed by seed, which cancels effects of the seed on both. A cell is empty if
    the student does not have the measure or cannot be compared with the reference. Lines below the table name
    different losses and trainings that ended before full depth. A second table has the probes.

    Args:
        results: from `collect`.
    """
    name, students = results["reference"], results["students"]
    reference = students.get(name, {"seeds": {}})["seeds"]
    seconds = _mean(_times(reference))
    measured = [one for content in students.values() for one in content["seeds"].values()]
    layers = sorted({layer for one in measured for layer in one["explained"]}, key=int)
    tasks = list(dict.fromkeys(task for one in measured for task in one["probes"]))
    header = ["student", "seeds", "held-out output loss", f"against {name}, %"]
    header += [f"variance explained, layer {layer}, %" for layer in layers]
    header += [f"{task}, %" for task in tasks]
    header += ["speed-up", f"reaches the loss of {name} after, % of its time"]
    having, kinds = kinds_of_students(results)
    of = {having[member]: kind for kind in kinds for member in kind.members}
    rows = []
    for student, content in students.items():
        seeds = content["seeds"]
        both = [seed for seed in seeds if seed in reference and seeds[seed]["loss"] and reference[seed]["loss"]]
        compared = both if of.get(student) is of.get(name) else []
        against = [100 * (seeds[seed]["loss"][-1] / reference[seed]["loss"][-1] - 1) for seed in compared]
        letter = f" ({of[student].letter})" if student in of and len(kinds) > 1 else ""
        loss = _text(_ends(seeds), ".4f")
        rows.append([
            student,
            str(len(seeds)),
            loss and loss + letter,
            "" if student == name else _text(against, "+.1f"),
            *(_text(_shares(seeds, "explained", layer), ".1f") for layer in layers),
            *(_text(_shares(seeds, "probes", task), ".1f") for task in tasks),
            _finite(seconds / _mean(_times(seeds)), ".2f", "x"),
            _reaches([(seeds[seed], reference[seed]) for seed in compared]),
        ])  # fmt: skip
    table = markdown_table(header, rows)
    if len(kinds) > 1:
        table += f"\n\nThe students have {len(kinds)} different output losses, which cannot be compared with each other"
        table += f": {describe_kinds(kinds, having)}."
        if any("criterion.target_normalization" in (kind.fields or {}) for kind in kinds):
            table += " Nor can their variance explained, because their targets are normalised differently."
    short = [
        f"{student} with seed {seed} ({measured['depth']} of {measured['full_depth']} layers)"
        for student, content in students.items()
        for seed, measured in content["seeds"].items()
        if measured.get("depth", 0) < measured.get("full_depth", 0)  # older measurements have neither
    ]
    if short:
        table += f"\n\nEnded before full depth: {', '.join(short)}."
    if any(content.get("probe_intervals") for content in students.values()):
        table += "\n\nProbes, with 95 % intervals over test recordings instead of seeds:\n\n" + _probe_table(
            results, tasks
        )
    return table


def _probe_table(results, tasks):
    """The scores of probes, and their differences from the reference over the seeds that both have."""
    name, students = results["reference"], results["students"]
    reference = students.get(name, {"seeds": {}})["seeds"]
    header = ["student", *(title for task in tasks for title in (f"{task}, %", f"{task} against {name}, points"))]
    rows = []
    for student, content in students.items():
        row = [student]
        for task in tasks:
            intervals = content["probe_intervals"].get(task, {"score": None, "against": None})
            score = _mean(_shares(content["seeds"], "probes", task))
            both = [
                100 * (measured["probes"][task] - reference[seed]["probes"][task])
                for seed, measured in content["seeds"].items()
                if task in measured["probes"] and task in reference.get(seed, {"probes": {}})["probes"]
            ]
            row.append(_with_interval(score, intervals["score"], ".1f"))
            row.append(_with_interval(_mean(both), intervals["against"], "+.1f"))
        rows.append(row)
    return markdown_table(header, rows)


def _with_interval(value, interval, form):
    """A number with an interval of shares, in per cent; empty if the interval is unknown."""
    return f"{value:{form}} [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]" if interval else ""


def kinds_of_students(results: dict[str, Any]) -> tuple[list[str], list[Kind]]:
    """Returns the students with an output loss, and their Kinds; see kinds_of."""
    having = [student for student, content in results["students"].items() if _ends(content["seeds"])]
    of = [next(iter(results["students"][student]["seeds"].values())).get("loss_of") for student in having]
    return having, kinds_of(of)


def _ends(seeds):
    return [measured["loss"][-1] for measured in seeds.values() if measured["loss"]]


def _times(seeds):
    return [measured["seconds_of_all"] for measured in seeds.values()]


def _shares(seeds, group, name):
    return [100 * measured[group][name] for measured in seeds.values() if name in measured[group]]


def _mean(values):
    return float(np.mean(values)) if values else math.nan


def _finite(value, form, unit):
    return f"{value:{form}}{unit}" if math.isfinite(value) else ""


def _reaches(pairs):
    """When each seed reaches the final loss of the reference with the same seed."""
    times = [(time_to_reach(one, other["loss"][-1]), other["seconds_of_all"]) for one, other in pairs]
    reached = [100 * time / whole for time, whole in times if time is not None]
    if not times:
        return ""
    return f"{_text(reached, '.0f')} ({len(reached)} of {len(times)} seeds)" if reached else "never"


def _text(values, form):
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    return format(mean, form) if math.isnan(interval) else f"{mean:{form}} ± {interval:{form.lstrip('+')}}"


def draw_curves(results: dict[str, Any], by: str) -> Figure:
    """Draws the held-out output loss of every student: the mean over the seeds, and a band from lowest to highest.

    Students with different output losses have separate axes.

    Args:
        results: from `collect`.
        by: "updates", or "minutes" of training.
    """
    name, scale = ("updates", 1) if by == "updates" else ("seconds", 60)
    with rc_context(STYLE):
        figure, axes = _axes(results)
        for axis, members in axes:
            highest = 0.0
            for student, (colour, style) in members.items():
                seeds = [one for one in results["students"][student]["seeds"].values() if one["loss"]]
                # A training that was stopped early has fewer validations.
                number = min(len(measured["loss"]) for measured in seeds)
                x = np.mean([measured[name][:number] for measured in seeds], axis=0) / scale
                losses = np.array([measured["loss"][:number] for measured in seeds])
                axis.plot(x, losses.mean(0), style, color=colour, linewidth=1.5, label=student)
                axis.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
                # The loss falls steeply in the first quarter, which would flatten the rest of the curves.
                highest = max(highest, float(np.interp(x[-1] / 4, x, losses.mean(0))))
            if highest > 0:
                axis.set_ylim(top=highest)
            axis.set_xlabel(by)
            axis.set_ylabel("held-out output loss")
            axis.legend(fontsize=10)
    return figure


def draw_loss_and_time(results: dict[str, Any]) -> Figure:
    """Draws the final held-out output loss against the time of training.

    Every seed is a dot. Means have a 95 % interval.

    Args:
        results: from `collect`.
    """
    with rc_context(STYLE):
        figure, axes = _axes(results)
        for axis, members in axes:
            for student, (colour, style) in members.items():
                seeds = [one for one in results["students"][student]["seeds"].values() if one["loss"]]
                minutes, losses = [[measured[name][-1] for measured in seeds] for name in ("seconds", "loss")]
                minutes = [value / 60 for value in minutes]
                mean, interval = mean_and_interval(losses)
                axis.plot(minutes, losses, ".", color=colour, alpha=0.5)
                marker = "o" if style == "-" else "s"
                axis.errorbar(np.mean(minutes), mean, interval, fmt=marker, color=colour, capsize=4, label=student)
            axis.set_xlabel("minutes of training")
            axis.set_ylabel("held-out output loss at the end")
            axis.legend(fontsize=10)
    return figure


def _axes(results):
    """A Figure, and (axis, {student: its colour and line style}) for each kind of output loss."""
    looks = {student: _look(number) for number, student in enumerate(results["students"])}
    having, kinds = kinds_of_students(results)
    figure = Figure(figsize=(8.5, 6 * max(len(kinds), 1)))
    axes = figure.subplots(max(len(kinds), 1), 1, squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds):
        if kind.letter:
            axis.set_title(f"Loss {kind.letter}", loc="left")
    members = [[having[member] for member in kind.members] for kind in kinds]
    return figure, [(axis, {student: looks[student] for student in students}) for axis, students in zip(axes, members)]


def _look(number):
    return COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
