"""Every command answers --help at once, and says something about each of its options."""

import argparse
import importlib
import re
import subprocess
import sys

import pytest
from training import ROOT

from fairseq_stack.cli import COMMANDS, main

SHELL_SCRIPTS = {path.name: path for path in sorted((ROOT / "scripts").glob("*.sh")) if path.stat().st_mode & 0o100}
HEAVY = {"torch", "fairseq", "transformers", "numpy", "hydra", "s3prl", "matplotlib"}


@pytest.fixture
def parsers(monkeypatch):
    """The parsers that a command makes."""
    made, init = [], argparse.ArgumentParser.__init__

    def remembered(parser, *args, **kwargs):
        init(parser, *args, **kwargs)
        made.append(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remembered)
    return made


def test_there_are_commands_and_scripts():
    assert {"report", "export", "prepare"} < set(COMMANDS) and len(COMMANDS) == 11 and "demo.sh" in SHELL_SCRIPTS


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_commands_explain_themselves_and_each_option_on_a_screen(name, parsers, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: fairseq-stack {name}".rstrip()) and 5 < len(output.splitlines()) < 40
    for parser in parsers:
        assert parser.description
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.option_strings or action.dest


def test_help_imports_nothing_heavy_and_python_m_is_the_same_command():
    code = (
        "import sys; from fairseq_stack.cli import COMMANDS, parse\n"
        "for name in ['', *COMMANDS]:\n"
        "    try: parse([*name.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "print('imported', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not HEAVY & set(done.stdout.splitlines()[-1].split()), done.stderr
    done = subprocess.run([sys.executable, "-m", "fairseq_stack", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: fairseq-stack ")


def test_the_entry_point_is_this_command():
    module, function = re.search(r"fairseq-stack *= *([\w.]+):(\w+)", (ROOT / "setup.py").read_text()).groups()
    assert getattr(importlib.import_module(module), function) is main


def test_choices_and_defaults_that_help_states_are_those_of_the_package(capsys):
    """They are written out, because help does not import what knows them."""
    from fairseq_stack.benchmark.baselines import BASELINES
    from fairseq_stack.benchmark.inputs import SIZES
    from fairseq_stack.benchmark.roofline import GPUS
    from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT
    from fairseq_stack.export.student import FORMATS

    def help_of(name):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert f"(default: {BAD_AUDIO_LIMIT})" in help_of("prepare")
    export, benchmark = help_of("export"), help_of("benchmark")
    for name, format in FORMATS.items():
        assert f" {name} {format.help}" in export
    assert f"{{{','.join(SIZES)}}}" in benchmark and f"{{{','.join(BASELINES)}}}" in benchmark
    assert all(f" {gpu}," in benchmark for gpu in GPUS)


@pytest.mark.parametrize(
    "line, says",
    [
        ("report run --output out --student student", "--student and --speech belong together"),
        ("prepare --output out", "give either --source, to prepare, or --check"),
        ("prepare --output out --source in --bad-audio-limit 1", "--bad-audio-limit 1.0 must be"),
        ("export nothing.pt --to nonsense --output out", "--to=nonsense is unknown; choose from huggingface, "),
        ("store-targets --config-name nonsense", "nonsense.yaml is no file and none of the examples; choose from "),
        ("store-targets --config-name librispeech_base task.data=x --processes 0 task.teacher=y", "--processes 0"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused_in_a_line(line, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code.startswith("error: ") and says in ended.value.code and "\n" not in ended.value.code
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["store-targets", "--config-name", "demo", "--nonsense", "task.data=x"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "fairseq-stack store-targets: error: unknown arguments: --nonsense"
    )


@pytest.mark.parametrize("failure, says", [
    (PermissionError(13, "Permission denied", "there"), "error: [Errno 13] Permission denied: 'there'"),
    (KeyboardInterrupt(), "interrupted; start the same command again"),
])  # fmt: skip
def test_what_stops_a_command_from_outside_ends_it_in_a_line(failure, says, monkeypatch):
    from fairseq_stack.cli import held_out

    def fail(args):
        raise failure

    monkeypatch.setattr(held_out, "run", fail)
    with pytest.raises(SystemExit) as ended:
        main(["held-out", "checkpoint.pt", "--speech", "test.tsv"])
    assert ended.value.code == says


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_scripts_explain_themselves_and_start_nothing(name, tmp_path):
    done = subprocess.run(
        [str(SHELL_SCRIPTS[name]), "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=30
    )
    assert done.returncode == 0 and done.stderr == ""
    assert f"scripts/{name}" in done.stdout and len(done.stdout.splitlines()) > 2
