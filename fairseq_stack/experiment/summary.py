"""The results of an experiment as one table and a set of figures."""

import math

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fairseq_stack.analysis.plots import COLOURS, STYLE
from fairseq_stack.analysis.report import markdown_table
from fairseq_stack.evaluation.statistics import mean_and_interval
from fairseq_stack.experiment.measures import time_to_reach


def summary_table(results):
    """One row for each student, means with a 95 % interval over the seeds, as Markdown.

    Compared with the reference is seed by seed, so that what a seed does to both drops out.
    """
    reference = results["students"][results["reference"]]["seeds"]
    goal, seconds = _mean_end(reference, "loss"), _mean_end(reference, "seconds")
    first = next(iter(reference.values()))
    layers, tasks = list(first["explained"]), list(first["probes"])
    name = results["reference"]
    header = ["student", "seeds", "held-out output loss", f"against {name}, %"]
    header += [f"variance explained, layer {layer}, %" for layer in layers]
    header += [f"{task}, %" for task in tasks]
    header += ["speed-up", f"reaches the loss of {name} after, % of its time"]
    rows = []
    for student, content in results["students"].items():
        seeds = content["seeds"]
        both = [seed for seed in seeds if seed in reference]
        against = [100 * (seeds[seed]["loss"][-1] / reference[seed]["loss"][-1] - 1) for seed in both]
        reached = [time_to_reach(measured, goal) for measured in seeds.values()]
        times = [100 * time / seconds for time in reached if time is not None]
        rows.append([
            student,
            str(len(seeds)),
            _text([measured["loss"][-1] for measured in seeds.values()], ".4f"),
            "" if student == name else _text(against, "+.1f"),
            *(_text([100 * measured["explained"][layer] for measured in seeds.values()], ".1f") for layer in layers),
            *(_text([100 * measured["probes"][task] for measured in seeds.values()], ".1f") for task in tasks),
            f"{seconds / _mean_end(seeds, 'seconds'):.2f}x",
            f"{np.mean(times):.0f} ({len(times)} of {len(reached)} seeds)" if times else "never",
        ])  # fmt: skip
    return markdown_table(header, rows)


def _mean_end(seeds, name):
    return float(np.mean([measured[name][-1] for measured in seeds.values()]))


def _text(values, form):
    mean, interval = mean_and_interval(values)
    return format(mean, form) if math.isnan(interval) else f"{mean:{form}} ± {interval:{form.lstrip('+')}}"


def draw_curves(results, by):
    """Held-out output loss of every student, mean over the seeds in a band from the lowest to the highest.

    Args:
        results: of `collect`.
        by: "updates", or "minutes" of training.

    Returns:
        a matplotlib Figure.
    """
    name, scale = ("updates", 1) if by == "updates" else ("seconds", 60)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 6))
        axis = figure.subplots()
        highest = 0.0
        for number, (student, content) in enumerate(results["students"].items()):
            seeds = list(content["seeds"].values())
            x = np.mean([measured[name] for measured in seeds], axis=0) / scale
            losses = np.array([measured["loss"] for measured in seeds])
            colour, style = _look(number)
            axis.plot(x, losses.mean(0), style, color=colour, linewidth=1.5, label=student)
            axis.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            # The first quarter falls steeply for all and would flatten what follows.
            highest = max(highest, float(np.interp(x[-1] / 4, x, losses.mean(0))))
        axis.set_ylim(top=highest)
        axis.set_xlabel(by)
        axis.set_ylabel("held-out output loss")
        axis.legend(fontsize=10)
    return figure


def draw_loss_and_time(results):
    """Final held-out output loss against the time of training: every seed a dot, the mean with its 95 % interval."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 6))
        axis = figure.subplots()
        for number, (student, content) in enumerate(results["students"].items()):
            seeds = list(content["seeds"].values())
            minutes, losses = [[measured[name][-1] for measured in seeds] for name in ("seconds", "loss")]
            minutes = [value / 60 for value in minutes]
            colour, style = _look(number)
            mean, interval = mean_and_interval(losses)
            axis.plot(minutes, losses, ".", color=colour, alpha=0.5)
            marker = "o" if style == "-" else "s"
            axis.errorbar(np.mean(minutes), mean, interval, fmt=marker, color=colour, capsize=4, label=student)
        axis.set_xlabel("minutes of training")
        axis.set_ylabel("held-out output loss at the end")
        axis.legend(fontsize=10)
    return figure


def _look(number):
    return COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
