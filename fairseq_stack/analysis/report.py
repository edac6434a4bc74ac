"""The report of trainings: losses, stages and layer similarity, as figures, tables and one web page."""

import base64
import html
import io
import math
import os
import re
from pathlib import Path

import yaml

from fairseq_stack.analysis.objective import batch_of, kinds_of, sentence
from fairseq_stack.analysis.plots import (
    draw_growths,
    draw_layer_weights,
    draw_losses,
    draw_similarity,
    lowest_similarity,
)
from fairseq_stack.analysis.stages import dearer_stages
from fairseq_stack.growth.similarity import layer_similarity

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
            _number(_over(cost, costs[-1]), ".2f"),
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
    return _over(costs[-1] * sum(stage.updates for stage in stages), spent)


def _over(value, other):
    return value / other if other else math.nan


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
    kinds = kinds_of([run.objective for run in runs])
    tables = {run.name: stage_table(run.stages, run.costs, run.valid.get("loss")) for run in runs}
    longest = max(run.hours(run.train["loss"])[-1] for run in runs)
    facts = _facts_of(runs, reference, kinds)
    notes = _notes(runs, kinds, reference)
    pictures = [
        ("loss", "Loss by updates", draw_losses(runs, "updates", kinds)),
        ("loss_by_time", "Loss by wall-clock time", draw_losses(runs, "hours" if longest > 2 else "minutes", kinds)),
    ]
    similarity = None if hidden_states is None else layer_similarity(hidden_states)
    around = [matrix for run in runs for growth in run.growths for matrix in (growth.before, growth.after)]
    lowest = lowest_similarity(around if similarity is None else [similarity, *around])
    if similarity is not None:
        drawn = draw_similarity(similarity, lowest, runs[0].block)
        pictures.append(("similarity", "Similarity of the finished student's hidden states", drawn))
    for number, run in enumerate(runs, start=1):
        if run.growths:
            several = len(runs) > 1
            title = "Similarity of the hidden states before and after each growth" + (f": {run.name}" if several else "")
            pictures.append((f"growths_{number}" if several else "growths", title, draw_growths(run.growths, lowest)))
    if layer_weights is not None:
        pictures.append(("layer_weights", "Hidden states that the probes use", draw_layer_weights(layer_weights)))
    pictures = [(name, title, _png(figure)) for name, title, figure in pictures]

    markdown = "\n".join(
        [
            (f"{name}\n\n" if len(runs) > 1 else "") + markdown_table(STAGE_COLUMNS, rows) + "\n"
            for name, rows in tables.items()
        ]
        + [f"{note}\n" for note in notes]
    )
    output.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for old in output.glob(f"{name}.png"):  # of a report on something else
            old.unlink()
    for name, _, png in pictures:
        _write(output / f"{name}.png", png)
    _write(output / "stages.md", markdown.encode())
    page = _page(facts, notes, tables, pictures, {run.name: run.config for run in runs})
    _write(output / "index.html", page.encode())
    return markdown


def _facts_of(runs, reference, kinds):
    """{run: {what: value}} of what to know first about each run."""
    output = kinds_of([run.output_objective for run in runs])
    # Where the whole losses differ, that of the teacher's last layer may still be the same.
    shared = len(kinds) > 1 and len(output) == 1 and output[0].fields is not None
    facts = {}
    for number, run in enumerate(runs):
        found = facts[run.name] = {
            "layers": " → ".join(str(stage.depth) for stage in run.stages),
            "updates": f"{run.updates:,}",
        }
        for kind in kinds:
            if any(runs[position].valid for position in kind.members):
                own = run.valid and number in kind.members
                value = _number(run.valid["loss"].values[-1], ".4f") if own else "–"
                found[f"last validation loss {kind.letter}".rstrip()] = value
        if shared and "output_loss" in run.valid:
            last = run.valid["output_loss"].values[-1]
            found["last validation loss, teacher's last layer alone"] = _number(last, ".4f")
        found["wall-clock time"] = _duration(3600 * max(run.hours(run.train["loss"])))
        found["training time"] = _duration(run.seconds)
        if len(run.stages) > 1:
            found[f"speed-up over {run.stages[-1].depth} layers throughout"] = _ratio(
                speedup(run.stages, run.costs), run.steady
            )
        if reference is not None:
            faster = _over(reference.seconds / reference.updates, run.seconds / run.updates)
            text = "–" if run is reference else _ratio(faster, run.steady and reference.steady)
            found[f"speed-up over {reference.name}"] = text
    return facts


def _notes(runs, kinds, reference=None):
    """Sentences on what in the report cannot be compared."""
    found = []
    if len(kinds) > 1:
        losses = sentence(kinds, [run.name for run in runs])
        found.append(f"These runs have {len(kinds)} different losses, which cannot be compared with each other: {losses}.")
    elif len(runs) > 1 and kinds[0].fields is None:
        found.append("The configuration of these runs was not kept, so whether their losses can be compared is unknown.")
    wanted = batch_of(reference.config) if reference else None
    for run in runs if wanted else ():
        batch = batch_of(run.config) or wanted
        differ = [f"{name}={value} and not {wanted[name]}" for name, value in batch.items() if value != wanted[name]]
        if differ:
            found.append(
                f"{run.name}: an update holds other speech than one of {reference.name} ({', '.join(differ)}), so the"
                f" speed-up over {reference.name} compares different work."
            )
    for run in runs:
        dearer = dearer_stages(run.stages, run.costs)
        if dearer:
            found.append(
                (f"{run.name}: " if len(runs) > 1 else "")
                + f"{'; '.join(dearer)}. Other work on the machine has slowed the shallower stage down, so the relative"
                " costs and the speed-ups of this run are not reliable."
            )
    return found


def _ratio(value, steady):
    text = _number(value, ".2f")
    return text if text == "–" else f"{text}×" if steady else f"{text}× (not reliable)"


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
    "<p>Seconds of an update are the median of a stage, and seconds are those of all its updates at the median:"
    " validation, growth, checkpoints and the time between two starts are left out. The relative cost compares an"
    " update with one of the last stage. The speed-up over the last stage's depth throughout takes the cost of that"
    " stage for all updates. The speed-up over another run compares the mean of these medians over all updates. Valid"
    " loss is the first and the last validation at the stage's depth.</p>"
)
_EXPLAINED = {
    "loss": "Strong lines with dots: validation; faint lines: training; dashed lines: growths.",
    "loss_by_time": "With validation, checkpoints and loading; without the time between two starts and without"
    " what a resumed run did again.",
    "similarity": "Linear CKA on held-out speech: 1 where two hidden states carry the same information up to a"
    " rotation. Lines mark the layers that come from one layer of the first stage.",
    "growths": "Linear CKA on the batch at which the student grew. Hidden state 0 is the input of the first layer. All"
    " similarities of this report have one scale of colours.",
    "layer_weights": "The softmax of the weighted sum that each probe has learned, mean over seeds.",
}

_CSS = """
:root { color-scheme: light; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 4vw, 2rem) 3rem; }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; overflow-wrap: break-word; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; overflow-wrap: break-word; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 0; }
dl div { background: #f3f5f7; border-radius: 0.4rem; padding: 0.6rem 0.8rem; }
dt { font-size: 0.85rem; color: #555; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
figure { margin: 0; }
img { width: 100%; max-width: 50rem; height: auto; display: block; margin: 0 auto; }
/* A table wider than the page scrolls in its box; a shadow at the edge tells that there is more. */
.scroll {
  overflow-x: auto;
  background:
    linear-gradient(to right, #fff 40%, #fff0) left / 3rem 100%,
    linear-gradient(to left, #fff 40%, #fff0) right / 3rem 100%,
    linear-gradient(to right, #0003, #0000) left / 0.75rem 100%,
    linear-gradient(to left, #0003, #0000) right / 0.75rem 100%;
  background-attachment: local, local, scroll, scroll;
  background-repeat: no-repeat;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem clamp(0.35rem, 1.2vw, 0.7rem); text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
td { font-size: clamp(0.85rem, 3.4vw, 1rem); }
th { font-size: clamp(0.75rem, 3vw, 0.85rem); font-weight: 600; color: #555; vertical-align: bottom; white-space: normal; }
p { max-width: 45rem; color: #444; font-size: 0.95rem; overflow-wrap: break-word; }
.note { border-left: 0.25rem solid #D55E00; padding-left: 0.75rem; }
.runs td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
/* The stages fit into the width of a phone. */
@media (max-width: 27rem) {
  .stages td, .stages th { padding: 0.4rem 0.1rem; font-size: 0.72rem; }
  .stages th { font-size: 0.62rem; }
}
summary { cursor: pointer; }
pre { overflow-x: auto; background: #f3f5f7; padding: 0.8rem; font-size: 0.8rem; border-radius: 0.4rem; }
"""


def _page(facts, notes, tables, pictures, configs):
    """The report as one HTML page that needs no other file."""
    title = f"Distillation report: {', '.join(facts)}" if len(facts) <= 3 else f"Distillation report: {len(facts)} runs"
    several = len(facts) > 1
    sections = [_comparison(facts) if several else _cards(*facts.values())]
    sections += [f'<p class="note">{_breakable(note)}</p>' for note in notes]
    figures = [_figure(*picture) for picture in pictures]
    sections += figures[:2]
    sections.append("<h2>Stages</h2>")
    for name, rows in tables.items():
        sections.append((f"<h3>{_breakable(name)}</h3>\n" if several else "") + _table(STAGE_COLUMNS, rows))
    sections.append(_STAGES_EXPLAINED)
    sections += figures[2:]
    if any(configs.values()):
        sections.append("<h2>Configuration</h2>")
        sections += [
            f"<details><summary>{_breakable(name)}, as resolved for the training</summary>"
            f'<pre tabindex="0">{html.escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre></details>'
            for name, config in configs.items()
            if config
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{_breakable(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
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
    head = "".join(f'<th scope="col">{_breakable(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr><td>{_breakable(first)}</td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _breakable(text):
    """Text as HTML whose lines may break behind the signs that join the words of a name (hyphens let them anyway)."""
    return re.sub(r"([/_])", r"\1<wbr>", html.escape(text))


def _figure(name, title, png):
    kind = re.sub(r"_\d+$", "", name)
    explained = f"<p>{_EXPLAINED[kind]}</p>" if kind in _EXPLAINED else ""
    return (
        f'<h2>{_breakable(title)}</h2>\n<figure><img alt="{html.escape(title)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>{explained}'
    )
