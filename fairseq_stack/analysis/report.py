"""The report of trainings: losses, stages and layer similarity, as figures, tables and one web page."""

import base64
import html
import io
import math
import os
from pathlib import Path

import yaml

from fairseq_stack.analysis.plots import (
    draw_growths,
    draw_layer_weights,
    draw_losses,
    draw_similarity,
)
from fairseq_stack.analysis.similarity import layer_similarity

# What the figures of a report are called; those of growths have a number where there are several runs.
FIGURES = ("loss", "loss_by_time", "similarity", "growths", "growths_*", "layer_weights")

STAGE_COLUMNS = (
    "stage",
    "layers",
    "updates",
    "seconds",
    "s/update",
    "relative",
    "first valid loss",
    "last valid loss",
)


def stage_table(stages, costs, valid_loss=None):
    """One row of text per stage, in the order of STAGE_COLUMNS.

    Args:
        stages: list of Stage.
        costs: seconds per update of each stage, nan where unknown.
        valid_loss: Series of the validation loss. A validation at the update at which a stage ends
            still saw that stage's depth.

    Returns:
        a list of rows of strings.
    """
    rows = []
    for stage, cost in zip(stages, costs):
        first, last = math.nan, math.nan
        if valid_loss is not None:
            inside = valid_loss.values[(valid_loss.updates > stage.begin) & (valid_loss.updates <= stage.end)]
            first, last = (inside[0], inside[-1]) if len(inside) else (first, last)
        rows.append([
            str(stage.number),
            str(stage.depth),
            f"{stage.updates:,}",
            _number(cost * stage.updates, ",.1f"),
            _number(cost, ".3f"),
            _number(cost / costs[-1], ".2f"),
            _number(first, ".4f"),
            _number(last, ".4f"),
        ])
    return rows


def speedup(stages, costs):
    """How much faster the training was than the same updates at the cost of the last stage.

    The measure behind "1.16x" in Kim & Lee, Interspeech 2026, with the last stage standing in for
    a training at full depth. nan where the cost of a stage is unknown.
    """
    spent = sum(cost * stage.updates for stage, cost in zip(stages, costs))
    return costs[-1] * sum(stage.updates for stage in stages) / spent


def markdown_table(header, rows):
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_report(runs, output, reference=None, hidden_states=None, layer_weights=None):
    """Write index.html, its figures as PNG files, and stages.md.

    Args:
        runs: list of Run, the reference among them.
        output: folder to write to; made where it is missing, files of an earlier report replaced.
        reference: the Run to compare the time of an update with.
        hidden_states: hidden states 0 to N of the first run's finished student, each [frames, D].
        layer_weights: {upstream: {task: [N + 1]}}, the weighted sums of probes.

    Returns:
        the text of stages.md.
    """
    output = Path(output)
    tables = {run.name: stage_table(run.stages, run.costs, run.valid.get("loss")) for run in runs}
    longest = max(run.hours(run.train["loss"])[-1] for run in runs)
    facts = {run.name: dict(_facts(run, reference)) for run in runs}
    pictures = [
        ("loss", "Loss by updates", draw_losses(runs, "updates")),
        ("loss_by_time", "Loss by wall-clock time", draw_losses(runs, "hours" if longest > 2 else "minutes")),
    ]
    if hidden_states is not None:
        drawn = draw_similarity(layer_similarity(hidden_states), runs[0].block)
        pictures.append(("similarity", "Similarity of the finished student's hidden states", drawn))
    for number, run in enumerate(runs, start=1):
        if run.growths:
            several = len(runs) > 1
            title = "Similarity of the hidden states before and after each growth" + (f": {run.name}" if several else "")
            pictures.append((f"growths_{number}" if several else "growths", title, draw_growths(run.growths)))
    if layer_weights is not None:
        pictures.append(("layer_weights", "Hidden states that the probes use", draw_layer_weights(layer_weights)))
    pictures = [(name, title, _png(figure)) for name, title, figure in pictures]

    markdown = "\n".join(
        (f"{name}\n\n" if len(runs) > 1 else "") + markdown_table(STAGE_COLUMNS, rows) + "\n"
        for name, rows in tables.items()
    )
    output.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for old in output.glob(f"{name}.png"):  # of a report on something else
            old.unlink()
    for name, _, png in pictures:
        _write(output / f"{name}.png", png)
    _write(output / "stages.md", markdown.encode())
    _write(output / "index.html", _page(facts, tables, pictures, {run.name: run.config for run in runs}).encode())
    return markdown


def _facts(run, reference):
    """Pairs (what, value) of what to know first about a run."""
    yield "layers", " → ".join(str(stage.depth) for stage in run.stages)
    yield "updates", f"{run.updates:,}"
    if run.valid:
        yield "last validation loss", _number(run.valid["loss"].values[-1], ".4f")
    yield "wall-clock time", _duration(3600 * max(run.hours(run.train["loss"])))
    yield "training time", _duration(run.seconds)
    if len(run.stages) > 1:
        yield f"speed-up over {run.stages[-1].depth} layers throughout", _number(speedup(run.stages, run.costs), ".2f") + "×"
    if reference is not None:
        faster = reference.seconds / reference.updates / (run.seconds / run.updates)
        yield f"speed-up over {reference.name}", _number(faster, ".2f") + "×" if run is not reference else "–"


def _number(value, form):
    return format(value, form) if math.isfinite(value) else "–"


def _duration(seconds):
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(path, content):
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


_STAGES_EXPLAINED = (
    "<p>Seconds are training time: validation, growth and the time between two starts are left out. The relative"
    " cost compares an update with one of the last stage. The speed-up over the last stage's depth throughout takes"
    " the cost of that stage for all updates; the one over another run compares the mean time of an update. Valid"
    " loss is the first and the last validation at the stage's depth.</p>"
)
_EXPLAINED = {
    "loss": "Strong lines with dots: validation; faint lines: training; dashed lines: growths.",
    "loss_by_time": "With validation, checkpoints and loading; without the time between two starts and without"
    " what a resumed run did again.",
    "similarity": "Linear CKA on held-out speech: 1 where two hidden states carry the same information up to a"
    " rotation. Lines mark the layers that come from one layer of the first stage.",
    "growths": "Linear CKA on the batch at which the student grew.",
    "layer_weights": "The softmax of the weighted sum that each probe has learned, mean over seeds.",
}

_CSS = """
:root { color-scheme: light; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 4vw, 2rem) 3rem; }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 0; }
dl div { background: #f3f5f7; border-radius: 0.4rem; padding: 0.6rem 0.8rem; }
dt { font-size: 0.85rem; color: #555; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
figure { margin: 0; }
img { width: 100%; max-width: 50rem; height: auto; display: block; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem clamp(0.25rem, 1.2vw, 0.7rem); text-align: right; border-bottom: 1px solid #ddd; }
td { font-size: clamp(0.85rem, 3.4vw, 1rem); }
th { font-size: clamp(0.75rem, 3vw, 0.85rem); font-weight: 600; color: #555; vertical-align: bottom; }
p { max-width: 45rem; color: #444; font-size: 0.95rem; }
.runs th { overflow-wrap: anywhere; }
.runs td:first-child { text-align: left; }
@media (max-width: 30rem) {
  .stages th, .stages td { font-size: 0.67rem; padding: 0.4rem 0.1rem; }
}
summary { cursor: pointer; }
pre { overflow-x: auto; background: #f3f5f7; padding: 0.8rem; font-size: 0.8rem; border-radius: 0.4rem; }
"""


def _page(facts, tables, pictures, configs):
    """The report as one HTML page that needs no other file."""
    title = f"Distillation report: {', '.join(facts)}" if len(facts) <= 3 else f"Distillation report: {len(facts)} runs"
    several = len(facts) > 1
    sections = [_comparison(facts) if several else _cards(*facts.values())]
    figures = [_figure(*picture) for picture in pictures]
    sections += figures[:2]
    sections.append("<h2>Stages</h2>")
    for name, rows in tables.items():
        sections.append((f"<h3>{html.escape(name)}</h3>\n" if several else "") + _table(STAGE_COLUMNS, rows))
    sections.append(_STAGES_EXPLAINED)
    sections += figures[2:]
    if any(configs.values()):
        sections.append("<h2>Configuration</h2>")
        sections += [
            f"<details><summary>{html.escape(name)}, as resolved for the training</summary>"
            f'<pre tabindex="0">{html.escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre></details>'
            for name, config in configs.items()
            if config
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _cards(facts):
    cards = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{cards}</dl>"


def _comparison(facts):
    """A table with a row for each fact and a column for each run."""
    names = list(dict.fromkeys(name for of_run in facts.values() for name in of_run))
    rows = [[name, *(of_run.get(name, "–") for of_run in facts.values())] for name in names]
    return _table(("", *facts), rows, "runs")


def _table(header, rows, name="stages"):
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _figure(name, title, png):
    explained = f"<p>{_EXPLAINED[name]}</p>" if name in _EXPLAINED else ""
    return (
        f'<h2>{html.escape(title)}</h2>\n<figure><img alt="{html.escape(title)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>{explained}'
    )
