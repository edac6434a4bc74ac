"""The report of a training: losses, stages and layer similarity, as figures, tables and one web page."""

import base64
import html
import io
import math
import os
from pathlib import Path

from fairseq_stack.analysis.plots import draw_losses, draw_similarity
from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.analysis.similarity import layer_similarity
from fairseq_stack.analysis.stages import find_stages, seconds_per_update
from fairseq_stack.errors import InputError

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


def write_report(run, output, hidden_states=None, block=None, config=None):
    """Write loss.png, stages.md, index.html and, with hidden states, similarity.png.

    Args:
        run: folder of the training, with tensorboard/ in it.
        output: folder to write to; made where it is missing, files of an earlier report replaced.
        hidden_states: hidden states 0 to N of the finished student, each [frames, D].
        block: layers per block, marked in the similarity matrix.
        config: text of the resolved configuration, shown on the page.

    Returns:
        the text of stages.md.

    Raises:
        InputError: the run's scalars are missing or not those of a distillation.
    """
    run, output = Path(run), Path(output)
    train = read_scalars(run / "tensorboard" / "train_inner")
    for name in ("loss", "stage", "depth"):
        if name not in train:
            raise InputError(
                f"{run / 'tensorboard'} has no scalar {name!r}; give a training of speech_distillation"
            )
    valid = read_scalars(run / "tensorboard" / "valid") if (run / "tensorboard" / "valid").is_dir() else {}
    valid_loss = valid.get("loss")

    last_update = max(int(series.updates[-1]) for series in (train["loss"], valid_loss) if series is not None)
    stages = find_stages(train["stage"], train["depth"], last_update)
    costs = seconds_per_update(stages, train["loss"], valid_loss)
    rows = stage_table(stages, costs, valid_loss)
    facts = [("layers", " → ".join(str(stage.depth) for stage in stages)), ("updates", f"{last_update:,}")]
    if valid_loss is not None:
        facts.append(("last validation loss", _number(valid_loss.values[-1], ".4f")))
    facts.append(("training time", _duration(sum(c * s.updates for c, s in zip(costs, stages)))))
    if len(stages) > 1:
        facts.append(("speed-up over full depth", _number(speedup(stages, costs), ".2f") + "×"))

    figures = [("loss.png", "Training and validation loss by update", draw_losses(train, valid, stages))]
    if hidden_states is not None:
        drawn = draw_similarity(layer_similarity(hidden_states), block)
        figures.append(("similarity.png", "Linear CKA between the student's hidden states", drawn))
    images = [(name, title, _png(figure)) for name, title, figure in figures]
    table = markdown_table(STAGE_COLUMNS, rows) + "\n"

    output.mkdir(parents=True, exist_ok=True)
    for name, _, png in images:
        _write(output / name, png)
    _write(output / "stages.md", table.encode())
    _write(output / "index.html", _page(run.resolve().name, facts, rows, images, config).encode())
    return table


def _number(value, form):
    return format(value, form) if math.isfinite(value) else "–"


def _duration(seconds):
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(path, content):
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


_CSS = """
:root { color-scheme: light; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 4vw, 2rem) 3rem; }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
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
summary { cursor: pointer; }
pre { overflow-x: auto; background: #f3f5f7; padding: 0.8rem; font-size: 0.8rem; border-radius: 0.4rem; }
"""


def _page(name, facts, rows, images, config):
    """The report as one HTML page that needs no other file."""
    cards = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    head = "".join(f'<th scope="col">{column}</th>' for column in STAGE_COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    stage_section = (
        '<h2>Stages</h2>\n<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "<p>Seconds are training time: validation, growth and the time between two starts are left out."
        " The relative cost compares an update with one of the last stage; the speed-up assumes that a"
        " training at full depth spends every update as the last stage did. Valid loss is the first and"
        " the last validation at the stage's depth.</p>"
    )
    sections = [
        f'<h2>{html.escape(title)}</h2>\n<figure><img alt="{html.escape(title)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for _, title, png in images
    ]
    sections.insert(1, stage_section)
    if config is not None:
        sections.append(
            "<h2>Configuration</h2>\n<details><summary>The resolved configuration of the training</summary>"
            f'<pre tabindex="0">{html.escape(config)}</pre></details>'
        )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Distillation report: {html.escape(name)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>Distillation report: {html.escape(name)}</h1>\n<dl>{cards}</dl>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
