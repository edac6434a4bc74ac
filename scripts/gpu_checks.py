"""Run the checks of a GPU and print one table: scripts/gpu_checks.sh calls this."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "scripts/gpu_wheels.txt"
LOGS = ROOT / "outputs/gpu_checks"
LIMIT = 520  # seconds for all checks together
TESTS = "tests"
MEASURE = ["-m", "fairseq_stack", "benchmark", "--device", "cuda", "--seconds", "12", "--rounds", "3"]
LARGE, SMALL = [*MEASURE, "--batch", "64"], [*MEASURE, "--batch", "8"]
LIVE, STORED = ["--targets", "live", "--cnn"], ["--targets", "stored", "--cnn"]
# Most of a test's time is that of the CPU, to import and to start.
SIDE_BY_SIDE = ["-n", "4"] if importlib.util.find_spec("xdist") else []
# A check for each case: if one takes too long, only its own figures are lost. The first ones matter most.
CHECKS = {
    TESTS: ["-m", "pytest", "-q", "-p", "no:cacheprovider", *SIDE_BY_SIDE, "tests/gpu"],
    "fp16": [*LARGE, "--precision", "fp16", *LIVE, "trained"],
    "bf16": [*LARGE, "--precision", "bf16", *LIVE, "trained"],
    "s3prl": [*LARGE, "--precision", "--baseline", "s3prl"],
    "fp16, shared CNN": [*LARGE, "--precision", "fp16", *LIVE, "shared"],
    "fp16, stored targets, shared CNN": [*LARGE, "--precision", "fp16", *STORED, "shared"],
    "fp32": [*LARGE, "--precision", "fp32", *LIVE, "trained"],
    "fairseq": [*LARGE, "--precision", "--baseline", "fairseq"],
    "fp16, 8 utterances": [*SMALL, "--precision", "fp16", *LIVE, "trained"],
    "s3prl, 8 utterances": [*SMALL, "--precision", "--baseline", "s3prl"],
}
SHARE = 150  # seconds that a check may take at most
BASELINE = "s3prl"
HEADER = ["result", "update at full depth, ms", "its parts, ms", "peak memory, GiB", "against s3prl", "check took, s"]


def commands(folder: Path = LOGS) -> dict[str, list[str]]:
    """Return the command of each check. It writes its results to `folder`."""
    return {
        name: [sys.executable, *command, f"--junitxml={result}"] if name == TESTS else
        [sys.executable, *command, "--output", str(result)]
        for name, command in CHECKS.items()
        for result in [result_file(name, folder)]
    }  # fmt: skip


def result_file(name: str, folder: Path) -> Path:
    return folder / (f"{name}.xml" if name == TESTS else f"{name}.json")


def lacking(names: Sequence[str]) -> list[str]:
    """Return which of these packages, and of all packages that they need, are not installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*(name for name in names if not _installed(name)), "packaging"]
    waiting, seen, absent = list(names), set(), []
    while waiting:
        name = waiting.pop(0)
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        if not _installed(name):
            absent.append(name)
        elif name != "torch":  # may be built without some of the packages that it names
            needs = [Requirement(line) for line in metadata.requires(name) or []]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return absent


def _installed(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def run(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command with its output in `log`, and return "passed", "failed" or "out of time".

    When time is out, its children end too.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return "failed" if process.wait(timeout=max(seconds, 0)) else "passed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def test_rows(file: Path) -> Iterator[list[str]]:
    """Yield a row for each test in a JUnit file."""
    for case in ElementTree.parse(file).iter("testcase"):
        verdicts = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        verdict = next((verdicts[child.tag] for child in case if child.tag in verdicts), "passed")
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        yield [name, verdict, "", "", "", "", f"{float(case.get('time', 0)):.0f}"]


def measured(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the batch size and the figures of the only case in the benchmark's JSON file."""
    found = json.loads(file.read_text(encoding="utf-8"))
    (figures,) = found["cases"].values()
    return found["batch"], figures


def full_depth(figures: dict[str, Any]) -> str | None:
    """Return the number of layers of the deepest update that fitted into memory."""
    return max(figures["update"], key=int, default=None)


def cells(figures: dict[str, Any], s3prl: float | None) -> list[str]:
    """Return the cells of the table for a measured case: update, parts, memory and ratio.

    Args:
        figures: of `measured`.
        s3prl: seconds of an update of s3prl's distiller with as many utterances, or None.
    """
    depth = full_depth(figures)
    if depth is None:
        return ["does not fit into memory", "", "", ""]
    seconds = figures["update"][depth]
    parts = ", ".join(f"{part} {1e3 * spent:.0f}" for part, spent in figures["parts"][depth].items())
    memory = f"{figures['peak_memory'] / 2**30:.1f}" if "peak_memory" in figures else ""
    return [f"{1e3 * seconds:.1f}", parts, memory, f"{s3prl / seconds:.2f}x" if s3prl else ""]


def check(todo: dict[str, list[str]], folder: Path, limit: float = LIMIT) -> tuple[list[list[str]], bool]:
    """Run all checks, and return the rows of the table and whether everything passed.

    Args:
        todo: {name: command}, as `commands` returns them.
        folder: of the results and the logs.
        limit: seconds for all checks together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    verdicts, took, begin = {}, {}, time.monotonic()
    for name, command in todo.items():
        result_file(name, folder).unlink(missing_ok=True)
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        verdicts[name] = run(command, folder / f"{name}.log", min(SHARE, limit - (start - begin)))
        took[name] = f"{time.monotonic() - start:.0f}"
    figures = {
        name: measured(result_file(name, folder))
        for name in todo
        if name != TESTS and result_file(name, folder).exists()
    }
    s3prl = {
        batch: found["update"].get(full_depth(found)) for name, (batch, found) in figures.items() if BASELINE in name
    }
    rows = []
    for name, verdict in verdicts.items():
        said = verdict if verdict == "passed" else f"{verdict}: see {folder / name}.log"
        batch, found = figures.get(name, (None, None))
        rows.append([name, said, *(cells(found, s3prl.get(batch)) if found else [""] * 4), took[name]])
        if name == TESTS and result_file(name, folder).exists():
            rows += test_rows(result_file(name, folder))
    return rows, set(verdicts.values()) == {"passed"}


def main() -> None:
    if sys.argv[1:] == ["--dry-run"]:
        for command in commands().values():
            print(shlex.join(command))
        return
    if sys.argv[1:]:
        sys.exit(f"error: {' '.join(sys.argv[1:])} is no option; see scripts/gpu_checks.sh --help")
    lines = [
        line.split("==")[0] for line in WHEELS.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
    ]
    absent = lacking(["torch", *lines, "pytest", "tensorboard"])
    if absent:
        sys.exit(f"error: {sys.executable} lacks {', '.join(absent)}; scripts/gpu_wheels.txt says how to bring them")
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU")
    from fairseq_stack.tables import markdown_table

    rows, whole = check(commands(), LOGS)
    print(markdown_table([torch.cuda.get_device_name(), *HEADER], rows))
    sys.exit(not whole)


if __name__ == "__main__":
    main()
