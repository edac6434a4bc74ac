"""scripts/gpu_checks.sh, as far as it can be tried without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from fairseq_stack.cli import benchmark

ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_checks, gpu_kernels = loaded("gpu_checks"), loaded("gpu_kernels")


def script(*options):
    return subprocess.run(
        [ROOT / "scripts/gpu_checks.sh", "--here", *options], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU, and the checks take minutes")
def test_without_a_gpu_one_line_says_so_at_once():
    ended = script()
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "error: this machine has no GPU\n")


def test_its_commands_are_those_of_the_benchmark_and_of_existing_tests():
    tests, *measurements = script("--dry-run").stdout.splitlines()
    assert (ROOT / tests.split()[-2]).is_dir()
    parser = ArgumentParser()
    benchmark.add_arguments(parser)
    precisions, baselines = set(), set()
    for line in measurements:
        options = parser.parse_args(line.split("--output")[0].split()[4:])
        assert (options.device, options.seconds) == ("cuda", 12) and options.batch in (8, 64)
        precisions.update(options.precision)
        baselines.update(options.baseline)
        # The table has a row for each, with the figures of one case.
        assert len(options.precision) * len(options.targets) * len(options.cnn) + len(options.baseline) == 1
    assert sorted(precisions) == ["bf16", "fp16", "fp32"] and sorted(baselines) == ["fairseq", "s3prl"]


def test_an_unknown_option_ends_in_one_line():
    ended = script("--fast")
    assert ended.returncode == 1 and ended.stderr.startswith("error: --fast is no option")


def test_all_missing_packages_are_named_at_once():
    assert gpu_checks.lacking(["pytest", "no-such-a", "tensorboard", "no-such-b"]) == ["no-such-a", "no-such-b"]


def test_one_table_holds_all_results(tmp_path):
    xml = ("<testsuites><testsuite><testcase name='test_a_b[fp16]' time='2.2'/><testcase name='test_c' time='1'>"
           "<failure/></testcase></testsuite></testsuites>")  # fmt: skip
    ours = {
        "update": {"3": 0.1, "12": 0.2},
        "parts": {"12": {"targets": 0.05, "backward": 0.15}},
        "peak_memory": 2**31,
    }
    s3prl = {"update": {"12": 0.5}, "parts": {"12": {}}}
    write = "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    todo = {"tests": [sys.executable, "-c", write, tmp_path / "tests.xml", xml, "1"]}
    cases = {"fp16": (64, ours), "s3prl": (64, s3prl), "fp16, 8": (8, ours), "big": (64, {"update": {}, "parts": {}})}
    for name, (batch, figures) in cases.items():
        result = json.dumps({"batch": batch, "cases": {"case": figures}})
        todo[name] = [sys.executable, "-c", write, tmp_path / f"{name}.json", result, "0"]
    todo["broken"] = [sys.executable, "-c", "raise SystemExit(1)"]
    rows, whole = gpu_checks.check(todo, tmp_path)
    assert not whole
    assert [row[:-1] for row in rows] == [
        ["tests", f"failed: see {tmp_path}/tests.log", "", "", "", ""],
        ["a b[fp16]", "passed", "", "", "", ""],
        ["c", "failed", "", "", "", ""],
        ["fp16", "passed", "200.0", "targets 50, backward 150", "2.0", "2.50x"],
        ["s3prl", "passed", "500.0", "", "", "1.00x"],
        ["fp16, 8", "passed", "200.0", "targets 50, backward 150", "2.0", ""],
        ["big", "passed", "does not fit into memory", "", "", ""],
        ["broken", f"failed: see {tmp_path}/broken.log", "", "", "", ""],
    ]
    assert all(len(row) == 1 + len(gpu_checks.HEADER) for row in rows)


def test_a_command_that_takes_too_long_ends_with_its_children(tmp_path):
    command = ["bash", "-c", f"sleep 1000 & echo $! > {tmp_path}/child; wait"]
    assert gpu_checks.run(command, tmp_path / "log", 1) == "out of time"
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_the_comparison_of_convolutions_has_a_row_for_each(monkeypatch, capsys):
    for name, value in {"WIDTHS": (32, 16), "FRAMES": 20, "SAMPLES": 800}.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--batch", "1", "--precision", "fp32", "bf16"])
    gpu_kernels.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["fp32"] * 5 + ["bf16"] * 5
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
