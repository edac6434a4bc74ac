"""All probes on all upstreams: run what is missing, keep the numbers in a file, make a table of them.

The file, results.json, holds

    {"speech": folder,
     "tasks": {task: {"metric": "accuracy" or "character error rate", "classes": number or null,
                      "chance": accuracy of the most frequent answer or null,
                      "train": recordings, "valid": recordings, "test": recordings}},
     "without": {task: why it was left out},
     "threads": number, of the real-time factors,
     "upstreams": {name: {"of": hash of what it was measured on,
                          "layers": hidden states, input of the first layer included,
                          "parameters": number,
                          "multiply_adds_per_second": number,
                          "real_time_factor": number,
                          "tasks": {task: {seed: PROBE}}}},
     "held_out_variance": {"of": hashes, "checkpoint": file,
                           "shares": {teacher layer: share}, "at_initialisation": {teacher layer: share}}}

with, for each PROBE,

    {"test": number, "valid": number, "test_wer": number (recognition only),
     "learning_rates": [one for each fold], "layer_weights": [one for each hidden state; their sum is 1]}

Rows stand in the order of the table; `held_out_variance` only where a checkpoint was given. Numbers are as in SUPERB,
not in percent: an accuracy of 0.9, an error rate of 0.7.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from fairseq_stack.analysis.held_out import explained_before_and_after
from fairseq_stack.analysis.intervals import mean_and_interval
from fairseq_stack.data.prepare import SPLITS
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation import heads
from fairseq_stack.evaluation.cost import (
    count_parameters,
    multiply_adds,
    real_time_factor,
)
from fairseq_stack.evaluation.features import extract
from fairseq_stack.evaluation.tasks import read_tasks
from fairseq_stack.evaluation.upstreams import (
    TeacherUpstream,
    files_digest,
    load_export,
    load_log_mel,
    load_random,
)
from fairseq_stack.files import write_whole
from fairseq_stack.tables import markdown_table
from fairseq_stack.teachers import load_teacher

VERSION = 1  # of the protocol; results of another one are made again


def upstream_rows(exports, teacher=None):
    """The rows of the table: {name: (what it depends on, function that loads it)}.

    Args:
        exports: paths, see load_export. The first gives its shape to the row "random student".
        teacher: see load_teacher.

    Raises:
        InputError: one of them cannot be loaded. All are tried, because the probes of the first take long.
    """
    for path in exports:
        load_export(path)
    if teacher:
        load_teacher(teacher)
    rows = {
        "random student": (files_digest(exports[0]), lambda: load_random(exports[0])),
        "log-mel": ("", load_log_mel),
        "log-mel, normalized (SUPERB's FBANK)": ("", lambda: load_log_mel(normalized=True)),
    }
    if teacher:
        rows = {"teacher": (files_digest(teacher), lambda: TeacherUpstream(teacher)), **rows}
    students = {}
    for path in map(Path, exports):
        name = path.stem if path.is_file() else path.resolve().name
        if name in students or name in rows:
            raise InputError(f"{path}: another row of the table is named {name}; rename the export")
        students[name] = files_digest(path), lambda path=path: load_export(path)
    return {**students, **rows}


def run_probes(rows, speech, seeds, file):
    """Run the probes that `file` does not hold yet, and write each result there as soon as it is known.

    A result is known when the model, labels, manifests and the protocol were the same.

    Args:
        rows: see `upstream_rows`.
        speech: folder that fairseq-stack prepare made.
        seeds: numbers.
        file: results.json; rows of it that are not asked for stay.

    Returns:
        the content of the file, with the rows that were asked for only.

    Raises:
        InputError: something of it cannot be read, or the labels allow no task.
    """
    file = Path(file)
    before = read_probe_results(file) if file.exists() else {"upstreams": {}}
    known = before["upstreams"]
    tasks, without = read_tasks(speech)
    results = {
        **before,
        "speech": str(speech),
        "tasks": {task.name: _describe(task) for task in tasks},
        "without": without,
        "threads": torch.get_num_threads(),
    }
    data = hashlib.sha256()
    for name in ("labels.tsv", *(f"{split}.tsv" for split in SPLITS)):
        data.update(Path(speech, name).read_bytes())
    for name, (weights, load) in rows.items():
        of = hashlib.sha256(f"{VERSION} {data.hexdigest()} {weights}".encode()).hexdigest()
        entry = known[name] if name in known and known[name]["of"] == of else {"of": of, "tasks": {}}
        known[name] = entry
        for _ in _fill(entry, load, tasks, seeds, name):
            write_probe_results(file, {**results, "upstreams": known})
    return {**results, "upstreams": {name: known[name] for name in rows}}


def _fill(entry, load, tasks, seeds, name):
    """Add to the entry of an upstream what it lacks, and yield after each addition."""
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
    recordings, spoken = {}, {}
    for task in {task.name: task for task, _ in missing}.values():
        recordings.update(task.recordings)
        if not task.classes:
            spoken = task.recordings
    means, frames = extract(upstream, recordings, spoken, name)
    for task, seed in tqdm(missing, desc=name, unit=" probes"):
        if task.classes:
            result = heads.classify(task, means, upstream, seed)
        else:
            with tempfile.TemporaryDirectory() as folder:
                units = heads.train_units([text for _, text in task.folds[0].train], Path(folder, "units"))
            result = heads.recognize(task, frames, upstream, units, seed)
        entry["tasks"].setdefault(task.name, {})[str(seed)] = result
        yield


def add_held_out(file, held_out, checkpoint, speech):
    """Add to results.json how much of the teacher a checkpoint's student predicts on test.tsv; return that entry.

    Args:
        file: results.json.
        held_out: what read_held_out has read of the checkpoint and the test set.
        checkpoint: the file.
        speech: folder with test.tsv.
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
        "metric": "accuracy" if task.classes else "character error rate",
        "classes": len(task.classes) or None,
        "chance": task.chance if task.classes else None,
        **parts,
    }


def read_probe_results(file):
    """Read results.json.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        if isinstance(results["upstreams"], dict):
            return results
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{file} cannot be read as results of fairseq-stack evaluate; remove it, or give another --output")


def write_probe_results(file, results):
    """Write results.json as a whole or not at all."""
    write_whole(file, json.dumps(results, indent=1, ensure_ascii=False) + "\n", f"--output {file}")


def probe_table(results, seeds):
    """The results as Markdown: per cent with a 95 % interval over the seeds, and what each row costs."""
    header = ["upstream"]
    for name, task in results["tasks"].items():
        error = task["metric"] != "accuracy"
        header.append(f"{name}, {'CER % (lower is better)' if error else 'accuracy %'}")
    header += ["M parameters", "G multiply-adds / s", "real-time factor"]
    rows = []
    for name, entry in results["upstreams"].items():
        row = [name]
        for task in results["tasks"]:
            mean, interval = mean_and_interval([100 * entry["tasks"][task][str(seed)]["test"] for seed in seeds])
            row.append(f"{mean:.1f} ± {interval:.1f}" if len(seeds) > 1 else f"{mean:.1f}")
        row += [
            f"{entry['parameters'] / 1e6:.2f}",
            f"{entry['multiply_adds_per_second'] / 1e9:.3f}",
            f"{entry['real_time_factor']:.4f}",
        ]
        rows.append(row)
    chance = [f"{100 * task['chance']:.1f}" if task["classes"] else "" for task in results["tasks"].values()]
    rows.append(["most frequent answer", *chance, "", "", ""])
    return markdown_table(header, rows)
