"""The figures of the training report. Colours: Okabe & Ito's, told apart with any colour vision."""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"

# A figure has to be read on a phone, where it is shrunk to a third.
_STYLE = {
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


def draw_losses(train, valid, stages):
    """Training and validation loss over the updates, and below it the parts they are made of.

    Args:
        train: dict of Series of the training, with `loss` and any of `output_loss` and
            `intermediate_loss`.
        valid: the same of the validation; may be empty.
        stages: list of Stage; each beginning but the first is marked and labelled with its depth.

    Returns:
        a matplotlib Figure.
    """
    parts = [
        (name, label, colour)
        for name, label, colour in (
            ("output_loss", "output", BLUE),
            ("intermediate_loss", "intermediate", ORANGE),
        )
        if name in train or name in valid
    ]
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 7.5 if parts else 4.2))
        axes = figure.subplots(2 if parts else 1, 1, sharex=True, squeeze=False)[:, 0]
        _curves(axes[0], [("loss", "", BLUE)], train, valid)
        labelled = len(stages) <= 5
        axes[0].set_title("Loss" if labelled else "Loss (numbers: layers in use)", loc="left", pad=22)
        if parts:
            _curves(axes[1], parts, train, valid)
            axes[1].set_title("Parts of the loss", loc="left")
        for axis in axes:
            axis.set_ylabel("loss")
            for stage in stages[1:]:
                axis.axvline(stage.begin, color=GREY, linestyle="--", linewidth=1)
        for stage in stages:
            axes[0].annotate(
                f"{stage.depth} layers" if labelled else f"{stage.depth}",
                ((stage.begin + stage.end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=GREY,
                fontsize=10,
            )
        axes[-1].set_xlabel("updates")
        axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        axes[-1].set_xlim(0, 1.01 * stages[-1].end)
    return figure


def _curves(axis, parts, train, valid):
    drawn = []
    for name, label, colour in parts:
        for curves, source, style in (
            (train, "training", {"alpha": 0.45, "linewidth": 1.2}),
            (valid, "validation", {"linewidth": 1.5, "marker": "o", "markersize": 4}),
        ):
            if name in curves:
                updates, values = curves[name].updates, curves[name].values
                axis.plot(updates, values, color=colour, label=f"{label} {source}".strip(), **style)
                drawn.append(values)
    values = np.concatenate(drawn)
    # A loss that falls by an order of magnitude is a flat line on a linear axis.
    if values.min() > 0 and values.max() > 10 * values.min():
        axis.set_yscale("log")
    axis.legend(ncols=len(parts))


def draw_similarity(similarity, block=None):
    """The similarity matrix of hidden states 0 to N.

    Args:
        similarity: [N + 1, N + 1], linear CKA.
        block: layers per block (the copies of one layer of the first stage), marked by lines;
            None where the student has no blocks.

    Returns:
        a matplotlib Figure.
    """
    layers = len(similarity) - 1
    with rc_context({**_STYLE, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(7.5, 6.6))
        axis = figure.subplots()
        lowest = np.floor(np.nanmin(similarity) * 10) / 10
        image = axis.imshow(similarity, origin="lower", cmap="viridis", vmin=min(lowest, 0.9), vmax=1)
        figure.colorbar(image, label="linear CKA", shrink=0.85)
        for edge in range(0, layers, block) if block else ():
            # Black on white: seen on the dark and on the light end of the colours.
            for colour, width in (("white", 4), ("black", 1.5)):
                axis.axhline(edge + 0.5, color=colour, linewidth=width)
                axis.axvline(edge + 0.5, color=colour, linewidth=width)
        ticks = range(0, layers + 1, 1 + layers // 14)
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.set_xlabel("hidden state (0: input of the first layer)")
        axis.set_ylabel("hidden state")
        axis.set_title("Similarity of the student's layers", loc="left")
    return figure
