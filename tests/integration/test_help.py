"""Every command answers --help, and says something about each of its options."""

import argparse
import runpy
import subprocess
import sys

import pytest
from training import ROOT

from fairseq_stack.__main__ import main as fairseq_stack
from fairseq_stack.export.command import main as fairseq_stack_export

SCRIPTS = {path.name: path for path in sorted((ROOT / "scripts").glob("*.py"))}
SHELL_SCRIPTS = {path.name: path for path in sorted((ROOT / "scripts").glob("*.sh")) if path.stat().st_mode & 0o100}


@pytest.fixture
def parsers(monkeypatch):
    """The parsers that a command makes."""
    made, init = [], argparse.ArgumentParser.__init__

    def remembered(parser, *args, **kwargs):
        init(parser, *args, **kwargs)
        made.append(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remembered)
    return made


def test_there_are_scripts():
    assert {"report.py", "export_student.py", "prepare_speech.py"} <= SCRIPTS.keys() and "demo.sh" in SHELL_SCRIPTS


PROGRAMS = [
    pytest.param(name, marks=pytest.mark.s3prl) if name == "evaluate.py" else name
    for name in (*SCRIPTS, "fairseq-stack-export", "fairseq_stack", "fairseq_stack doctor")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_python_commands_explain_themselves_and_each_option(name, parsers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*name.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        if name in SCRIPTS:
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        else:
            (fairseq_stack_export if name.endswith("export") else fairseq_stack)()
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: ") and len(output.splitlines()) > 5
    for parser in parsers:
        assert parser.description
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.option_strings or action.dest


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_scripts_explain_themselves_and_start_nothing(name, tmp_path):
    done = subprocess.run(
        [str(SHELL_SCRIPTS[name]), "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=30
    )
    assert done.returncode == 0 and done.stderr == ""
    assert f"scripts/{name}" in done.stdout and len(done.stdout.splitlines()) > 2
