"""Run the checks of a GPU and print one table: scripts/gpu_checks.sh calls this."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "scripts/gpu_wheels.txt"
LOGS = ROOT / "outputs/gpu_checks"
LIMIT = 520  # seconds for all checks together
TESTS = "tests"
# Without --rounds 3, three precisions take more than the limit.
MEASURE = ["-m", "fairseq_stack", "benchmark", "--device", "cuda", "--batch", "64", "--seconds", "12", "--rounds", "3"]
CHECKS = {
    TESTS: ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
    "fp16": [*MEASURE, "--precision", "fp16", "--baseline", "s3prl", "fairseq"],
    "bf16": [*MEASURE, "--precision", "bf16"],
    "fp32": [*MEASURE, "--precision", "fp32"],
}
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


def benchmark_rows(file: Path, s3prl: float | None) -> Iterator[list[str]]:
    """Yield a row for each case in the benchmark's JSON file.

    Args:
        file: written by `fairseq-stack benchmark --output`.
        s3prl: seconds of an update of s3prl's distiller.
    """
    for name, figures in json.loads(file.read_text(encoding="utf-8"))["cases"].items():
        if not figures["update"]:
            yield [name, "does not fit into memory", "", "", "", "", ""]
            continue
        depth, seconds = max(figures["update"].items(), key=lambda item: int(item[0]))
        parts = ", ".join(f"{part} {1e3 * spent:.0f}" for part, spent in figures["parts"][depth].items())
        memory = f"{figures['peak_memory'] / 2**30:.1f}" if "peak_memory" in figures else ""
        ratio = f"{s3prl / seconds:.2f}x" if s3prl else ""
        yield [name, "measured", f"{1e3 * seconds:.1f}", parts, memory, ratio, ""]


def check(todo: dict[str, list[str]], folder: Path, limit: float = LIMIT) -> tuple[list[list[str]], bool]:
    """Run all checks, and return the rows of the table and whether everything passed.

    Args:
        todo: {name: command}, as `commands` returns them.
        folder: of the results and the logs.
        limit: seconds for all checks together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, whole, s3prl, begin = [], True, None, time.monotonic()
    for name, command in todo.items():
        result, start = result_file(name, folder), time.monotonic()
        result.unlink(missing_ok=True)
        print(f"== {name}", file=sys.stderr, flush=True)
        verdict = run(command, folder / f"{name}.log", limit - (start - begin))
        found = []
        if result.exists() and name == TESTS:
            found = list(test_rows(result))
        elif result.exists():
            updates = json.loads(result.read_text(encoding="utf-8"))["cases"].get("s3prl", {}).get("update", {})
            s3prl = updates.get("12", s3prl)
            found = list(benchmark_rows(result, s3prl))
        if verdict != "passed":
            verdict = f"{verdict}: see {folder / name}.log"
        rows += [[name, verdict, "", "", "", "", f"{time.monotonic() - start:.0f}"], *found]
        whole = whole and verdict == "passed"
    return rows, whole


def main() -> None:
    if sys.argv[1:] == ["--dry-run"]:
        for command in commands().values():
            print(*command)
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
