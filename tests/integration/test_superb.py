"""s3prl's own speaker identification runs on an export by the documented command, and its results are collected.

The data has VoxCeleb1's layout and two voices, a low and a high sweep.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import TINY, stock_hubert

from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation.superb import best_runs, find_runs, scores
from fairseq_stack.export.s3prl import export_s3prl

ROOT = Path(__file__).parents[2]


def documented_command():
    """The command for SID in docs/superb.md, as a list of words."""
    block = re.search(r"```\n(python -m s3prl\.main SuperbSID.*?)```", (ROOT / "docs/superb.md").read_text(), re.DOTALL)
    return shlex.split(block[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of the documented command, with its paths and, in the end, a few steps instead of many."""
    folder = tmp_path_factory.mktemp("superb")
    generator = np.random.default_rng(0)
    lines = []
    for split, count in ((1, 8), (2, 4), (3, 4)):
        for number in range(count):
            name = f"id1000{1 + number % 2}/video{split}/{number:05}.wav"
            path = folder / "VoxCeleb1/dev/wav" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep = np.linspace(0.05, 0.1, 8000) * (1 + 5 * (number % 2))
            soundfile.write(path, 0.3 * np.sin(np.cumsum(sweep)) + 0.02 * generator.standard_normal(8000), 16_000)
            lines.append(f"{split} {name}")
    cache = folder / "home/.cache/s3prl"
    cache.mkdir(parents=True)
    (cache / "iden_split.txt").write_text("\n".join(lines) + "\n")

    model, cfg = stock_hubert(**TINY)
    pretraining = ("mask_emb", "final_proj", "label_embs")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(pretraining)}
    cfg["model"].update(_name="stacked_hubert", stack_method="none", stack_stages=1)
    state = {"model": {**weights, "stage": torch.tensor(0.0)}, "cfg": cfg}
    export_s3prl(student_from_checkpoint(state), folder / "student.pt")

    command = documented_command()
    paths = {
        "--target_dir": folder / "model/sid_lr1e-1",
        "--prepare_data.dataset_root": folder / "VoxCeleb1",
        "--build_upstream.path_or_url": folder / "student.pt",
    }
    for option, path in paths.items():
        command[command.index(option) + 1] = str(path)
    steps = "--train.total_steps 2 --train.log_step 1 --train.eval_step 1 --train.save_step 1"
    few = f"{steps} --device cpu --num_workers 0 --prepare_data.n_jobs 1 --cache_dir {folder / 'cache'}"
    done = subprocess.run(
        [sys.executable, *command[1:], *few.split()],
        env={**os.environ, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return paths["--target_dir"]


def test_it_trains_the_probe_and_leaves_the_student_frozen(run):
    first, second = (torch.load(run / f"train/step_{step}/model/state_dict.pt", weights_only=True) for step in (1, 2))
    assert not torch.equal(first["featurizer.weights"], second["featurizer.weights"])
    upstream = [name for name in first if name.startswith("upstream.")]
    exported = torch.load(run.parents[1] / "student.pt", weights_only=True)["model_weight"]
    assert len(upstream) == len(exported)
    for name in upstream:
        assert torch.equal(second[name], exported[name.removeprefix("upstream.upstream.model.")]), name


def test_it_evaluates_its_best_checkpoint(run):
    result = yaml.safe_load((run / "evaluate/valid_best/test/result.yaml").read_text())
    assert result["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_the_collector_finds_the_run(run):
    (found,) = find_runs(run.parent)
    assert (found.problem, found.learning_rate, found.fold) == ("SuperbSID", 0.1, "")
    assert (
        found.valid
        == yaml.safe_load((run / "train/valid_best/training_stats.yaml").read_text())["valid_best_metrics"]["accuracy"]
    )
    result = yaml.safe_load((run / "evaluate/valid_best/test/result.yaml").read_text())
    assert found.test == {"SID acc": 100 * result["accuracy"]}


def copy_of(run, folder, learning_rate, valid, test):
    """The run with other numbers in the files that s3prl wrote."""
    shutil.copytree(run, folder)
    (config,) = (folder / "configs").glob("*.yaml")
    for path, change in (
        (config, lambda content: content["build_optimizer"]["conf"].update(lr=learning_rate)),
        (
            folder / "train/valid_best/training_stats.yaml",
            lambda content: content["valid_best_metrics"].update(accuracy=valid),
        ),
        (folder / "evaluate/valid_best/test/result.yaml", lambda content: content.update(accuracy=test)),
    ):
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content))
    return folder


def test_the_learning_rate_that_is_best_on_dev_counts_whatever_the_test_says(run, tmp_path):
    copy_of(run, tmp_path / "a", 0.1, valid=0.6, test=0.7)
    copy_of(run, tmp_path / "b", 0.01, valid=0.8, test=0.5)
    copy_of(run, tmp_path / "c", 0.001, valid=0.7, test=0.9)
    copy_of(run, tmp_path / "diverged", 1.0, valid=float("nan"), test=0.0)
    copy_of(run, tmp_path / "a_diverged", 1.0, valid=float("nan"), test=0.0)
    (best,) = best_runs(find_runs(tmp_path))
    assert best.learning_rate == 0.01
    assert scores([best]) == {"SID acc": 50.0}


def test_the_table_stands_beside_the_published_numbers(run, tmp_path, capsys):
    copy_of(run, tmp_path / "mine/sid", 0.1, valid=0.6, test=0.725)
    main(["collect-superb", tmp_path / "mine"])
    output = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.out.splitlines()]
    assert rows[0] == ["model", "PR PER", "ASR WER", "SF F1", "SF CER", "SID acc"]
    assert rows[2] == ["mine", "", "", "", "", "72.50"]
    assert ["Interleaved, PROP-1", "8.88", "9.99", "85.70", "", "73.60"] in rows
    assert ["DistilHuBERT", "16.27", "13.37", "82.57", "35.59", "73.54"] in rows
    assert "learning rate 0.1 is best on dev" in output.err


def test_a_run_without_a_test_result_leaves_its_column_empty(run, tmp_path):
    folder = copy_of(run, tmp_path / "a", 0.1, valid=0.6, test=0.7)
    shutil.rmtree(folder / "evaluate")
    assert scores(best_runs(find_runs(tmp_path))) == {}


def test_a_damaged_run_is_named(run, tmp_path):
    folder = copy_of(run, tmp_path / "a", 0.1, valid=0.6, test=0.7)
    (folder / "evaluate/valid_best/test/result.yaml").write_text("accuracy: [")
    with pytest.raises(InputError, match="result.yaml cannot be read"):
        find_runs(tmp_path)
    (config,) = (folder / "configs").glob("*.yaml")
    config.write_text("build_optimizer: [1]")
    (folder / "evaluate/valid_best/test/result.yaml").write_text("accuracy: 0.5")
    with pytest.raises(InputError, match="has lr=None instead of a number"):
        find_runs(tmp_path)
    with pytest.raises(InputError, match="has no run of s3prl"):
        find_runs(tmp_path / "a/configs")
