"""The figures of the report, in Okabe & Ito's colours for readers with any colour vision."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fairseq_stack.analysis.objective import Kind
from fairseq_stack.analysis.runs import Run
from fairseq_stack.growth.growth_similarity import GrowthSimilarity

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
PARTS = (("output_loss", "output", COLOURS[0]), ("intermediate_loss", "intermediate", COLOURS[1]))

# Legible on a phone, which shows a figure at a third of its size.
STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
}


def draw_losses(runs: Sequence[Run], by: str = "updates", kinds: Sequence[Kind] | None = None) -> Figure:
    """Draws the training and validation loss by updates or by time, and marks every growth.

    A figure of one run also has the parts of the loss and the depth of each stage. In a figure of several runs each
    run has a colour, and runs with different losses have separate axes.

    Args:
        runs: at least one.
        by: "updates", or wall-clock time in "hours" or "minutes".
        kinds: of `runs`, see kinds_of; None if all have the same loss.
    """
    parts = [part for part in PARTS if len(runs) == 1 and part[0] in runs[0].train]
    groups = [kind.members for kind in kinds or ()] or [list(range(len(runs)))]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 7.5 if parts else 1.2 + 3.4 * len(groups)))
        axes = figure.subplots(2 if parts else len(groups), 1, sharex=True, squeeze=False)[:, 0]
        for axis, members in zip(axes, groups):
            for number in members:
                run, colour = runs[number], COLOURS[number % len(COLOURS)]
                style = ("-", ":")[number // len(COLOURS) % 2]
                _curves(axis, run, by, [("loss", run.name if len(runs) > 1 else None, colour)], style)
                for stage in run.stages[1:]:
                    place = _place(run, stage.begin, by)
                    for marked in axes if parts else (axis,):
                        marked.axvline(place, color=GREY if len(runs) == 1 else colour, linestyle="--", linewidth=1)
        for axis, kind in zip(axes, kinds or ()):
            if kind.letter:
                axis.set_title(f"Loss {kind.letter}", loc="left")
        if parts:
            _curves(axes[1], runs[0], by, parts)
            axes[1].set_title("Parts of the loss", loc="left")
        if len(runs) == 1:
            _label_depths(axes[0], runs[0], by)
        for axis in axes:
            axis.set_ylabel("loss")
            _log_if_wide(axis)
            axis.legend(ncols=max(len(parts), 1) if axis is axes[-1] else 1)
        axes[-1].set_xlabel(by)
        axes[-1].xaxis.set_major_formatter("{x:,.0f}" if by == "updates" else "{x:g}")
        drawn = [line for axis in axes for line in axis.lines if line.get_linestyle() != "--"]
        axes[-1].set_xlim(0, 1.01 * max(line.get_xdata()[-1] for line in drawn))
    return figure


def _places(run, series, by):
    """Positions [E] of a Series' entries on the axis."""
    return series.updates if by == "updates" else run.hours(series) * {"hours": 1, "minutes": 60}[by]


def _place(run, update, by):
    """Position of an update on the axis."""
    loss = run.train["loss"]
    return update if by == "updates" else float(np.interp(update, loss.updates, _places(run, loss, by)))


def _label_depths(axis, run, by):
    """Writes the depth of each stage above the plot. If there is little room, only the title has the word "layers"."""
    ends = _place(run, run.updates, by)
    spans = [(_place(run, stage.begin, by), _place(run, stage.end, by)) for stage in run.stages]
    roomy = all(end - begin > 0.11 * ends for begin, end in spans)
    axis.set_title("Loss" if roomy else "Loss (numbers: layers in use)", loc="left", pad=22)
    for stage, (begin, end) in zip(run.stages, spans):
        axis.annotate(
            f"{stage.depth} layers" if roomy else f"{stage.depth}",
            ((begin + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=GREY,
            fontsize=10,
        )


def _curves(axis, run, by, parts, style="-"):
    for name, label, colour in parts:
        for curves, source, look in (
            (run.train, "training", {"alpha": 0.45, "linewidth": 1.2}),
            (run.valid, "validation", {"linewidth": 1.5, "marker": "o", "markersize": 4}),
        ):
            if name in curves:
                x, values = _places(run, curves[name], by), curves[name].values
                axis.plot(x, values, style, color=colour, label=_label(run, label, source), **look)


def _label(run, label, source):
    """The legend's text. Each of several runs has one entry: its validation, or its training if it has none."""
    if label != run.name:
        return f"{label} {source}" if label else source
    return label if source == "validation" or not run.valid else None


def _log_if_wide(axis):
    """Uses a logarithmic axis for a loss that falls by an order of magnitude, which a linear axis shows as flat."""
    drawn = [line for line in axis.lines if line.get_linestyle() != "--"]
    values = np.concatenate([line.get_ydata() for line in drawn])
    if values.min() > 0 and values.max() > 10 * values.min():
        axis.set_yscale("log")


def lowest_similarity(matrices: Iterable[np.ndarray]) -> float:
    """Returns the lower end of a common colour scale: the smallest entry, rounded down to a tenth, but at most 0.9.

    The limit of 0.9 keeps noise from looking like structure.
    """
    values = [np.nanmin(matrix) for matrix in matrices if np.isfinite(matrix).any()]
    return min([0.9, *(float(np.floor(value * 10) / 10) for value in values)])


def draw_similarity(similarity: np.ndarray, lowest: float, block: int | None = None) -> Figure:
    """Draws the similarity matrix of hidden states 0 to N.

    Args:
        similarity: [N + 1, N + 1], linear CKA.
        lowest: lower end of the colour scale. Figures that are compared need the same; see lowest_similarity.
        block: layers per block (the copies of one layer of the first stage), which lines separate; None for a student
            without blocks.
    """
    with rc_context(_MATRIX_STYLE):
        figure = Figure(figsize=(7.5, 6.6))
        axis = figure.subplots()
        image = _matrix(axis, similarity, lowest)
        figure.colorbar(image, label="linear CKA", shrink=0.85)
        for edge in range(0, len(similarity) - 1, block) if block else ():
            # Black on white is visible on dark and on light colours.
            for colour, width in (("white", 4), ("black", 1.5)):
                axis.axhline(edge + 0.5, color=colour, linewidth=width)
                axis.axvline(edge + 0.5, color=colour, linewidth=width)
        axis.set_xlabel("hidden state (0: input of the first layer)")
        axis.set_ylabel("hidden state")
        axis.set_title("Similarity of the student's layers", loc="left")
    return figure


def draw_growths(growths: Sequence[GrowthSimilarity], lowest: float) -> Figure:
    """Draws the similarity matrices right before and right after each growth, side by side.

    Args:
        growths: at least one.
        lowest: see draw_similarity.
    """
    image = None
    with rc_context(_MATRIX_STYLE):
        figure = Figure(figsize=(7.5, 0.6 + 3.5 * len(growths)))
        axes = figure.subplots(len(growths), 2, squeeze=False)
        for row, growth in zip(axes, growths):
            for axis, matrix, when in zip(row, (growth.before, growth.after), ("before", "after")):
                image = _matrix(axis, matrix, lowest, ticks=7)
                axis.set_title(f"{when} update {growth.update:,}: {len(matrix) - 1} layers", loc="left", fontsize=11)
                axis.set_xlabel("hidden state")
            row[0].set_ylabel("hidden state")
        assert image is not None
        figure.colorbar(image, ax=axes, label="linear CKA", shrink=min(1.0, 0.3 + 0.6 / len(growths)))
    return figure


def draw_layer_weights(weights: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draws the weights of the hidden states in each probe's sum, one row of bars per upstream.

    Args:
        weights: {upstream: {task: [N + 1], summing to 1}}, the softmax of the learned weights.
    """
    tasks = list(dict.fromkeys(task for of_tasks in weights.values() for task in of_tasks))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.8 + 2.5 * len(weights)))
        axes = figure.subplots(len(weights), 1, squeeze=False, sharey=True)[:, 0]
        for axis, (upstream, of_tasks) in zip(axes, weights.items()):
            for task, values in of_tasks.items():
                number = tasks.index(task)
                left = np.arange(len(values)) + 0.8 * ((number + 0.5) / len(tasks) - 0.5)
                axis.bar(left, values, 0.8 / len(tasks), color=COLOURS[number % len(COLOURS)], label=task)
            axis.set_title(upstream, loc="left")
            axis.set_ylabel("weight")
            axis.set_xticks(range(len(values)))
            axis.grid(axis="x", visible=False)
        axes[-1].set_xlabel("hidden state (0: input of the first layer)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(tasks), 4))
    return figure


_MATRIX_STYLE: "dict[RcKeyType, Any]" = {
    **STYLE,
    "axes.grid": False,
    "axes.spines.top": True,
    "axes.spines.right": True,
}


def _matrix(axis, matrix, lowest, ticks=14):
    image = axis.imshow(matrix, origin="lower", cmap="viridis", vmin=lowest, vmax=1)
    numbers = range(0, len(matrix), -(-len(matrix) // ticks))
    axis.set_xticks(numbers)
    axis.set_yticks(numbers)
    return image
