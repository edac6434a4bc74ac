"""Runs the missing probes of all upstreams, saves the results in a file, and makes a table of them.

The file, results.json, holds

    {"speech": folder,
     "tasks": {task: {"metric": one of tasks.METRICS, "classes": number or null,
                      "chance": accuracy of the most frequent answer or null,
                      "train": recordings, "valid": recordings, "test": recordings}},
     "without": {task: reason why it was left out},
     "threads": number for the real-time factors,
     "upstreams": {name: {"of": hash of its weights, the speech and the protocol,
                          "layers": hidden states, input of the first layer included,
                          "parameters": number,
                          "multiply_adds_per_second": number, or null for an ONNX file,
                          "real_time_factor": number,
                          "tasks": {task: {seed: PROBE}}}},
     "held_out_variance": {"of": hashes, "checkpoint": file,
                           "shares": {teacher layer: share}, "at_initialisation": {teacher layer: share}}}

with, for each PROBE,

    {"test": number, "resampled": [its bootstrap, see analysis.intervals], "valid": number,
     "test_wer": number (recognition only), "learning_rates": [one for each fold],
     "layer_weights": [one for each hidden state; their sum is 1]}

Rows are in the order of the table. `held_out_variance` is there if a checkpoint was given. Numbers are not in per cent:
an accuracy of 0.9, an error rate of 0.7.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fairseq_stack.analysis.held_out import HeldOut, explained_before_and_after
from fairseq_stack.analysis.intervals import mean_and_interval, percentile_interval
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation import ctc, heads
from fairseq_stack.evaluation.cost import (
    count_parameters,
    multiply_adds,
    real_time_factor,
)
from fairseq_stack.evaluation.features import extract
from fairseq_stack.evaluation.tasks import METRICS, Task, read_tasks
from fairseq_stack.evaluation.upstreams import (
    TeacherUpstream,
    files_digest,
    is_onnx,
    load_export,
    load_log_mel,
    load_random,
)
from fairseq_stack.evaluation.verification import verify
from fairseq_stack.files import write_whole
from fairseq_stack.tables import markdown_table
from fairseq_stack.teachers import load_teacher

VERSION = 3  # of the protocol; results of another version are measured again
# {metric of a Task: a function of (task, features, upstream, seed), and whether it takes all frames as features}.
PROBES = {
    "accuracy": (heads.classify, False),
    "character error rate": (partial(ctc.recognize, units_of=ctc.text_units), True),
    "phoneme error rate": (partial(ctc.recognize, units_of=ctc.phone_units), True),
    "equal error rate": (verify, False),
}

# What a row depends on, as a hash, and a function that loads its upstream.
Row = tuple[str, Callable[[], nn.Module]]


def upstream_rows(exports: Sequence[str | Path], teacher: str | Path | None = None) -> dict[str, Row]:
    """Returns the rows of the table by name.

    Args:
        exports: paths, see load_export. The row "random student" has the shape of the first that is no ONNX file.
        teacher: see load_teacher.

    Raises:
        InputError: one of them cannot be loaded. All are loaded here, before the first probes, which take long.
    """
    for path in exports:
        load_export(path)
    if teacher:
        load_teacher(teacher)
    rows = {
        "log-mel": ("", load_log_mel),
        "log-mel, normalized (SUPERB's FBANK)": ("", lambda: load_log_mel(normalized=True)),
    }
    shaped = next((path for path in exports if not is_onnx(path)), None)
    if shaped:
        rows = {"random student": (files_digest(shaped), lambda: load_random(shaped)), **rows}
    if teacher:
        rows = {"teacher": (files_digest(teacher), lambda: TeacherUpstream(teacher)), **rows}
    students = {}
    for path in map(Path, exports):
        name = path.stem if path.is_file() else path.resolve().name
        if name in students or name in rows:
            raise InputError(f"{path}: another row of the table is named {name}; rename the export")
        students[name] = files_digest(path), lambda path=path: load_export(path)
    return {**students, **rows}


def run_probes(rows: Mapping[str, Row], speech: str | Path, seeds: Sequence[int], file: str | Path) -> dict[str, Any]:
    """Runs the probes whose results are not in `file` yet, and saves each result there at once.

    A saved result is used again only if the model, labels, manifests and the protocol are the same.

    Args:
        rows: see `upstream_rows`.
        speech: folder that fairseq-stack prepare made.
        seeds: one probe per task is trained with each.
        file: results.json; its other rows are kept.

    Returns:
        the content of the file, with only the given rows.

    Raises:
        InputError: a file cannot be read, or the labels allow no task.
    """
    file = Path(file)
    saved = read_probe_results(file) if file.exists() else {"upstreams": {}}
    entries = saved["upstreams"]
    tasks, without = read_tasks(speech)
    results = {
        **saved,
        "speech": str(speech),
        "tasks": {task.name: _describe(task) for task in tasks},
        "without": without,
        "threads": torch.get_num_threads(),
    }
    protocol = protocol_digest(speech)
    for name, (weights, load) in rows.items():
        of = hashlib.sha256(f"{protocol} {weights}".encode()).hexdigest()
        if name not in entries or entries[name]["of"] != of:
            entries[name] = {"of": of, "tasks": {}}
        for _ in _fill(entries[name], load, tasks, seeds, name):
            write_probe_results(file, {**results, "upstreams": entries})
    return {**results, "upstreams": {name: entries[name] for name in rows}}


def protocol_digest(speech: str | Path) -> str:
    """Returns what results depend on besides the model: the version of the protocol and a hash of the lists."""
    data = hashlib.sha256()
    phones = ["phones.tsv"] if Path(speech, "phones.tsv").exists() else []
    for name in ("labels.tsv", *phones, *(f"{split}.tsv" for split in SPLITS)):
        data.update(Path(speech, name).read_bytes())
    return f"{VERSION} {data.hexdigest()}"


def _fill(
    entry: dict[str, Any], load: Callable[[], Any], tasks: Sequence[Task], seeds: Sequence[int], name: str
) -> Iterator[None]:
    """Adds the missing results to the entry of an upstream, and yields after each."""
    missing = [(task, seed) for task in tasks for seed in seeds if str(seed) not in entry["tasks"].get(task.name, {})]
    if not missing and "real_time_factor" in entry:
        return
    upstream = load()
    if "real_time_factor" not in entry:
        entry.update(
            layers=upstream.num_layers,
            parameters=count_parameters(upstream),
            multiply_adds_per_second=multiply_adds(upstream),
            real_time_factor=real_time_factor(upstream),
        )
        yield
    recordings, with_frames = {}, {}
    for task in {task.name: task for task, _ in missing}.values():
        recordings.update(task.recordings)
        if PROBES[task.metric][1]:
            with_frames.update(task.recordings)
    means, frames = extract(upstream, recordings, with_frames, name)
    for task, seed in tqdm(missing, desc=name, unit=" probes"):
        probe, of_frames = PROBES[task.metric]
        result = probe(task, frames if of_frames else means, upstream, seed)
        entry["tasks"].setdefault(task.name, {})[str(seed)] = result
        yield


def add_held_out(file: str | Path, held_out: HeldOut, checkpoint: str | Path, speech: str | Path) -> dict[str, Any]:
    """Adds the share of the teacher's variance that a student explains on test.tsv to results.json.

    Args:
        file: results.json.
        held_out: from read_held_out, for the checkpoint and test.tsv.
        checkpoint: the student's file.
        speech: folder with test.tsv.

    Returns:
        the entry `held_out_variance`.
    """
    results = read_probe_results(file)
    of = " ".join(files_digest(path) for path in (checkpoint, held_out.teacher.name, Path(speech, "test.tsv")))
    entry = results.get("held_out_variance")
    if not entry or entry["of"] != of:
        trained, fresh = explained_before_and_after(held_out)
        entry = {
            "of": of,
            "checkpoint": str(checkpoint),
            "shares": {str(layer): share for layer, share in trained.items()},
            "at_initialisation": {str(layer): share for layer, share in fresh.items()},
        }
        write_probe_results(file, {**results, "held_out_variance": entry})
    return entry


def _describe(task):
    parts = {
        split: len({recording.utterance for fold in task.folds for recording, _ in getattr(fold, split)})
        for split in SPLITS
    }
    return {
        "metric": task.metric,
        "classes": len(task.classes) or None,
        "chance": task.chance if task.metric == "accuracy" else None,
        **parts,
    }


def read_probe_results(file: str | Path) -> dict[str, Any]:
    """Returns the content of results.json.

    Raises:
        InputError: the file cannot be read, or does not hold such results.
    """
    try:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        if isinstance(results["upstreams"], dict):
            return results
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{file} cannot be read as results of fairseq-stack evaluate; remove it, or give another --output")


def write_probe_results(file: str | Path, results: dict[str, Any]) -> None:
    """Writes results.json, whole or not at all."""
    write_whole(file, json.dumps(results, indent=1, ensure_ascii=False) + "\n", f"--output {file}")


def probe_table(results: dict[str, Any], seeds: Sequence[int]) -> str:
    """Returns the results as Markdown: scores in per cent, and the cost of each row.

    Scores have a 95 % interval over the seeds, and another over test recordings, in brackets.
    """
    header = ["upstream", *_titles(results), "M parameters", "G multiply-adds / s", "real-time factor"]
    rows = []
    for name, entry in results["upstreams"].items():
        row = [name]
        for task in results["tasks"]:
            mean, interval = mean_and_interval([100 * entry["tasks"][task][str(seed)]["test"] for seed in seeds])
            low, high = percentile_interval(100 * _resampled(entry, task, seeds))
            over_seeds = f" ± {interval:.1f}" if len(seeds) > 1 else ""
            row.append(f"{mean:.1f}{over_seeds} [{low:.1f}, {high:.1f}]")
        row += [
            f"{entry['parameters'] / 1e6:.2f}",
            f"{operations / 1e9:.3f}" if (operations := entry["multiply_adds_per_second"]) is not None else "–",
            f"{entry['real_time_factor']:.4f}",
        ]
        rows.append(row)
    chance = [
        f"{100 * task['chance']:.1f}" if task["metric"] == "accuracy" else "" for task in results["tasks"].values()
    ]
    rows.append(["most frequent answer", *chance, "", "", ""])
    return markdown_table(header, rows)


def difference_table(results: dict[str, Any], seeds: Sequence[int]) -> str:
    """Returns Markdown with the scores of the other rows minus those of the first, in percentage points.

    A cell has the mean over the seeds and, in brackets, the 95 % interval of the paired bootstrap over test recordings.
    """
    (_, first), *others = results["upstreams"].items()
    rows = []
    for name, entry in others:
        row = [name]
        for task in results["tasks"]:
            scores = [[100 * one["tasks"][task][str(seed)]["test"] for seed in seeds] for one in (entry, first)]
            resampled = 100 * (_resampled(entry, task, seeds) - _resampled(first, task, seeds))
            low, high = percentile_interval(resampled)
            row.append(f"{np.mean(scores[0]) - np.mean(scores[1]):+.1f} [{low:+.1f}, {high:+.1f}]")
        rows.append(row)
    return markdown_table(["upstream", *_titles(results)], rows)


def _titles(results):
    """The titles of the columns of scores."""
    metrics = {name: task["metric"] for name, task in results["tasks"].items()}
    return [
        f"{name}, {METRICS[metric]} %{'' if metric == 'accuracy' else ' (lower is better)'}"
        for name, metric in metrics.items()
    ]


def _resampled(entry, task, seeds):
    """The bootstrap of a score, averaged over the seeds."""
    return np.mean([entry["tasks"][task][str(seed)]["resampled"] for seed in seeds], axis=0)
