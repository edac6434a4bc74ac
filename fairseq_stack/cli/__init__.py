"""The command `fairseq-stack`: each subcommand has a module, which reads arguments, makes a call and prints its result.

A module has `add_arguments(parser)` and `run(args)`, and its docstring is the description of the subcommand. `run`
returns None, or an error message for a command that fails because of what it finds. It imports slow modules itself, so
that help is quick.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.extensions import load_extensions

COMMANDS = (
    "prepare",
    "doctor",
    "store-targets",
    "export",
    "evaluate",
    "cost",
    "report",
    "compare",
    "benchmark",
    "collect-superb",
    "held-out",
)


@one_line_errors
def main(arguments: Sequence[object] | None = None) -> None:
    """Run a subcommand; an error ends the program with one line and exit code 1.

    Args:
        arguments: the arguments of the command line (default: those of the program).
    """
    words: list[str] = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    args = parse(words)
    args.command_line = shlex.join(["fairseq-stack", *words])
    try:
        load_extensions(args.extensions, "--extensions")
        problem = args.run(args)
    except OSError as error:  # such as a full disk
        raise InputError(str(error)) from None
    except KeyboardInterrupt:
        problem = "interrupted; start the same command again"
    if problem:
        raise SystemExit(problem)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments, with the function `run` of their subcommand."""
    parser = argparse.ArgumentParser(
        prog="fairseq-stack",
        description="Prepare, evaluate and export distillations of speech foundation models; fairseq-hydra-train trains"
        " them. fairseq-stack COMMAND --help explains a command.",
    )
    parser.add_argument(
        "--extensions", metavar="FILE", action="append", default=[],
        help="Python file or module with your own parts, see docs/extending.md; give it before COMMAND, once for each",
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        description = module.__doc__ or ""
        summary = description.split("\n\n")[0].strip().rstrip(".")
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    args, left = parser.parse_known_args(arguments)
    # argparse does not take positional arguments that follow an option, if some came before it.
    if hasattr(args, "overrides") and not any(argument.startswith("-") for argument in left):
        args.overrides, left = args.overrides + left, []
    if left:
        args.error(f"unknown arguments: {' '.join(left)}")
    return args
