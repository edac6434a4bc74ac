"""The report of trainings: losses, stages and layer similarity, as figures, tables and one web page."""

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fairseq_stack.analysis.objective import Kind, batch_of, describe_kinds, kinds_of
from fairseq_stack.analysis.plots import (
    draw_growths,
    draw_layer_weights,
    draw_losses,
    draw_similarity,
    lowest_similarity,
)
from fairseq_stack.analysis.runs import Run
from fairseq_stack.analysis.scalars import Series
from fairseq_stack.analysis.stages import Stage, slowed_stages
from fairseq_stack.files import write_whole
from fairseq_stack.growth.similarity import layer_similarity
from fairseq_stack.tables import markdown_table

# Names of a report's figures. Those of growths have a number if there are several runs.
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


def stage_table(stages: Sequence[Stage], costs: Sequence[float], valid_loss: Series | None = None) -> list[list[str]]:
    """Returns one row of cells per stage, with the columns STAGE_COLUMNS.

    Args:
        stages: of the training.
        costs: seconds per update of each stage, nan where unknown.
        valid_loss: Series of the validation loss. A validation at the last update of a stage is at that stage's depth.
    """
    rows = []
    for stage, cost in zip(stages, costs):
        first, last = math.nan, math.nan
        if valid_loss is not None:
            inside = valid_loss.values[(valid_loss.updates > stage.begin) & (valid_loss.updates <= stage.end)]
            first, last = (inside[0], inside[-1]) if len(inside) else (first, last)
        rows.append(
            [
                str(stage.number),
                str(stage.depth),
                f"{stage.updates:,}",
                _number(cost * stage.updates, ",.1f"),
                _number(cost, ".3f"),
                _number(_over(cost, costs[-1]), ".2f"),
                _number(first, ".4f"),
                _number(last, ".4f"),
            ]
        )
    return rows


def speedup(stages: Sequence[Stage], costs: Sequence[float]) -> float:
    """Returns how many times faster the training was than the same updates at the cost of the last stage.

    Kim & Lee, Interspeech 2026, report this measure ("1.16x") against a training at full depth, which the last stage
    stands for here. nan if the cost of a stage is unknown.
    """
    spent = sum(cost * stage.updates for stage, cost in zip(stages, costs))
    return _over(costs[-1] * sum(stage.updates for stage in stages), spent)


def _over(value, other):
    return value / other if other else math.nan


def write_report(
    runs: Sequence[Run],
    output: str | Path,
    reference: Run | None = None,
    hidden_states: Sequence[np.ndarray] | None = None,
    layer_weights: dict[str, dict[str, np.ndarray]] | None = None,
) -> str:
    """Writes index.html, its figures as PNG files, and stages.md.

    Args:
        runs: at least one, the reference among them.
        output: folder to write to; created if it is missing. Files of an earlier report are replaced.
        reference: the Run whose seconds per update the others are compared with.
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
            title = "Similarity of the hidden states before and after each growth" + (
                f": {run.name}" if several else ""
            )
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
        write_whole(output / f"{name}.png", png)
    write_whole(output / "stages.md", markdown)
    page = _page(facts, notes, tables, pictures, {run.name: run.config for run in runs})
    write_whole(output / "index.html", page)
    return markdown


def _facts_of(runs: Sequence[Run], reference: Run | None, kinds: Sequence[Kind]) -> dict[str, dict[str, str]]:
    """The most important facts about each run, as {run: {label: value}}."""
    output = kinds_of([run.output_objective for run in runs])
    # Runs with different losses may still have the same loss of the teacher's last layer.
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
                speedup(run.stages, run.costs), run.reliable_times
            )
        if reference is not None:
            faster = _over(reference.seconds / reference.updates, run.seconds / run.updates)
            text = "–" if run is reference else _ratio(faster, run.reliable_times and reference.reliable_times)
            found[f"speed-up over {reference.name}"] = text
    return facts


def _notes(runs: Sequence[Run], kinds: Sequence[Kind], reference: Run | None) -> list[str]:
    """Sentences on figures of the report that cannot be compared."""
    found = []
    if len(kinds) > 1:
        losses = describe_kinds(kinds, [run.name for run in runs])
        found.append(
            f"These runs have {len(kinds)} different losses, which cannot be compared with each other: {losses}."
        )
    elif len(runs) > 1 and kinds[0].fields is None:
        found.append(
            "The configuration of these runs was not kept, so whether their losses can be compared is unknown."
        )
    expected = batch_of(reference.config) if reference else None
    for run in runs:
        batch = batch_of(run.config)
        if reference is None or expected is None or batch is None:
            continue
        differ = [
            f"{name}={value} and not {expected[name]}" for name, value in batch.items() if value != expected[name]
        ]
        if differ:
            found.append(
                f"{run.name}: updates differ in their speech from those of {reference.name} ({', '.join(differ)}), so"
                f" the speed-up over {reference.name} compares different work."
            )
    for run in runs:
        slowed = slowed_stages(run.stages, run.costs)
        if slowed:
            found.append(
                (f"{run.name}: " if len(runs) > 1 else "")
                + f"{'; '.join(slowed)}. Other work on the machine has slowed the shallower stage down, so the relative"
                " costs and the speed-ups of this run are not reliable."
            )
    return found


def _ratio(value, reliable):
    text = _number(value, ".2f")
    return text if text == "–" else f"{text}×" if reliable else f"{text}× (not reliable)"


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


_TEMPLATE = "report.html.jinja"


def _breakable(text):
    """Text as HTML whose lines may also break after / and _. Browsers break lines only after hyphens."""
    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(text))))


def _page(facts, notes, tables, pictures, configs):
    """The report as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    several = len(facts) > 1
    names = list(dict.fromkeys(name for of_run in facts.values() for name in of_run))
    return environment.get_template(_TEMPLATE).render(
        title="Distillation report: " + (", ".join(facts) if len(facts) <= 3 else f"{len(facts)} runs"),
        several=several,
        facts=facts,
        comparison=[[name, *(of_run.get(name, "–") for of_run in facts.values())] for name in names],
        notes=notes,
        stage_columns=STAGE_COLUMNS,
        tables=tables,
        figures=[
            {"kind": re.sub(r"_\d+$", "", name), "title": title, "png": base64.b64encode(png).decode()}
            for name, title, png in pictures
        ],
        configs={
            name: yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            for name, config in configs.items()
            if config
        },
    )
