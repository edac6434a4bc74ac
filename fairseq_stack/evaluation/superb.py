"""Collects the results of s3prl's SUPERB problems from the folders that they write.

A run of `python -m s3prl.main PROBLEM --target_dir RUN` writes to RUN

    configs/TIME.yaml                          its configuration, with the learning rate
    train/valid_best/training_stats.yaml       its best result on the development set
    train/valid_best/model/problem_name
    evaluate/valid_best/TEST/result.yaml       the results of that checkpoint on a test set

SUPERB searches the learning rate for every model and task and tests the run that is best on the development set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fairseq_stack.errors import InputError

# Problem: the metric on the development set, whether higher is better, and {column: metric}, in the table's order.
PROBLEMS = {
    "SuperbPR": ("per", False, {"PR PER": "per"}),
    "SuperbASR": ("wer", False, {"ASR WER": "wer"}),
    "SuperbSF": ("slot_type_f1", True, {"SF F1": "slot_type_f1", "SF CER": "slot_value_cer"}),
    "SuperbSID": ("accuracy", True, {"SID acc": "accuracy"}),
    "SuperbKS": ("accuracy", True, {"KS acc": "accuracy"}),
    "SuperbIC": ("accuracy", True, {"IC acc": "accuracy"}),
    "SuperbER": ("accuracy", True, {"ER acc": "accuracy"}),
    "SuperbSD": ("der", False, {"SD DER": "der"}),
}
COLUMNS = tuple(column for _, _, columns in PROBLEMS.values() for column in columns)


@dataclass(frozen=True)
class SuperbRun:
    """One training of one problem.

    Attributes:
        folder: its `--target_dir`.
        problem: a key of PROBLEMS.
        learning_rate: of the optimiser.
        fold: of cross-validation (ER); "" for other problems.
        valid: the metric of its best checkpoint on the development set.
        test: {column: per cent} of that checkpoint; empty if it was not tested yet.
    """

    folder: Path
    problem: str
    learning_rate: float
    fold: str
    valid: float
    test: dict[str, float]


def find_runs(folder: str | Path) -> list[SuperbRun]:
    """Returns every run below a folder, in the order of their paths.

    Args:
        folder: of a model, with runs of several problems and learning rates at any depth.

    Raises:
        InputError: there is no run, a run is of another problem, or a file cannot be read.
    """
    folder = Path(folder)
    found = sorted(folder.rglob("train/valid_best/training_stats.yaml"))
    if not found:
        raise InputError(
            f"{folder}: has no run of s3prl with a best checkpoint (train/valid_best/training_stats.yaml);"
            " give the folder that holds your --target_dir folders"
        )
    return [_read_run(stats.parents[2]) for stats in found]


def best_runs(runs: Sequence[SuperbRun]) -> list[SuperbRun]:
    """Returns the best run on the development set for each problem and fold, as SUPERB chooses it.

    Test results are not used. The first wins a tie. A diverged run (nan) is chosen only if all have diverged.

    Args:
        runs: of one model.

    Returns:
        the runs in the order of PROBLEMS.
    """
    best = []
    for problem, (_, higher, _) in PROBLEMS.items():
        for fold in sorted({run.fold for run in runs if run.problem == problem}):
            candidates = [run for run in runs if (run.problem, run.fold) == (problem, fold)]
            finite = [run for run in candidates if math.isfinite(run.valid)] or candidates
            best.append((max if higher else min)(finite, key=lambda run: run.valid))
    return best


def scores(runs: Sequence[SuperbRun]) -> dict[str, float]:
    """Returns {column: per cent} of the runs that best_runs chose, averaged over the folds.

    A problem with an untested fold is left out.
    """
    found = {}
    for column in COLUMNS:
        chosen = [run for run in runs if column in PROBLEMS[run.problem][2]]
        if chosen and all(run.test for run in chosen):
            found[column] = sum(run.test[column] for run in chosen) / len(chosen)
    return found


def _read_run(folder):
    best = folder / "train" / "valid_best"
    try:
        problem = (best / "model" / "problem_name").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(f"{best}/model/problem_name cannot be read ({error.strerror}); train this run again") from None
    if problem not in PROBLEMS:
        raise InputError(f"{folder} is a run of {problem}; choose a folder with runs of {', '.join(PROBLEMS)}")
    metric, _, columns = PROBLEMS[problem]
    stats = best / "training_stats.yaml"
    configs = sorted((folder / "configs").glob("*.yaml"))
    if not configs:
        raise InputError(f"{folder}/configs is empty; it should say the learning rate: train this run again")
    config = _read_yaml(configs[-1])
    tests = sorted((folder / "evaluate" / "valid_best").glob("*/result.yaml"))
    if len(tests) > 1:
        raise InputError(f"{folder}/evaluate/valid_best has results of {len(tests)} test sets; keep one")
    test = {}
    if tests:
        result = _read_yaml(tests[0])
        test = {column: 100 * _number(result, name, tests[0]) for column, name in columns.items()}
    return SuperbRun(
        folder=folder,
        problem=problem,
        learning_rate=_number(_group(_group(config, "build_optimizer"), "conf"), "lr", configs[-1]),
        fold=str(_group(config, "prepare_data").get("test_fold", "")),
        valid=_number(_group(_read_yaml(stats), "valid_best_metrics"), metric, stats),
        test=test,
    )


def _read_yaml(path):
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read as YAML that s3prl wrote; train or evaluate this run again")
    return content


def _group(mapping, key):
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _number(mapping, key, path):
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}: has {key}={value} instead of a number; train or evaluate this run again")
    return float(value)
