"""Run the commands of a documentation page, each in this process, where imports cost nothing."""

import logging
import re
import runpy
import shlex
import sys
from unittest import mock

from training import ROOT, train

from fairseq_stack.cli import main


def blocks(page, language=""):
    """The code blocks in a language of a page below the repository's root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands_of(page):
    """The commands of a page, in their order."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_command(line, **extra):
    """Run a command in the present folder. Arguments of `extra`, by program or script, follow its own."""
    program, *words = shlex.split(line, comments=True)
    name = words[0].rpartition("/")[2] if program == "python" else program
    words += extra.get(name.replace("-", "_").replace(".py", ""), [])
    if program == "fairseq-stack":
        main(words)
    elif program == "python":
        with mock.patch.object(sys, "argv", words):
            runpy.run_path(words[0], run_name="__main__")
    elif program == "fairseq-hydra-train":
        named = dict(zip(words[::2], words[1::2]))
        folder = named["--config-dir"].rpartition("/")[2]
        train(named["--config-name"], words[4:], folder=folder)
    elif program == "fairseq-validate":
        from fairseq_cli.validate import cli_main

        # It replaces the handlers of all logs.
        with mock.patch.object(sys, "argv", [program, *words]), mock.patch.object(logging.root, "handlers", []):
            cli_main()
    else:
        raise AssertionError(f"the tests do not know {program}: {line}")
