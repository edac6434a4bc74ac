"""The command `fairseq-stack`: a module for each subcommand, which takes arguments, makes a call and prints its result.

A module has `add_arguments(parser)` and `run(args)`; its docstring is the subcommand's description. `run` returns None, or
what is wrong, for a command that fails by what it finds. What takes long to import is imported in `run`, so that help is quick.
"""

import argparse
import shlex
import sys
from importlib import import_module

from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.extensions import load_extensions

COMMANDS = (
    "prepare",
    "doctor",
    "store-targets",
    "export",
    "evaluate",
    "report",
    "compare",
    "benchmark",
    "collect-superb",
    "held-out",
)


@one_line_errors
def main(arguments=None):
    """Run a subcommand; errors end the program in one line and with exit code 1.

    Args:
        arguments: of the command line (default: the program's).
    """
    arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
    args = parse(arguments)
    args.command_line = shlex.join(["fairseq-stack", *arguments])
    try:
        load_extensions(args.extensions, "--extensions")
        problem = args.run(args)
    except OSError as error:  # such as a full disk
        raise InputError(str(error)) from None
    except KeyboardInterrupt:
        problem = "interrupted; start the same command again"
    if problem:
        raise SystemExit(problem)


def parse(arguments):
    """The parsed arguments, with the function `run` of their subcommand."""
    parser = argparse.ArgumentParser(
        prog="fairseq-stack",
        description="Distil speech foundation models: what comes before and after fairseq's training."
        " fairseq-stack COMMAND --help explains a command.",
    )
    parser.add_argument(
        "--extensions", metavar="FILE", action="append", default=[],
        help="load a Python file or module with your own parts, see docs/extending.md; before COMMAND, may be repeated",
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        summary = module.__doc__.split("\n\n")[0].strip().rstrip(".")
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    args, left = parser.parse_known_args(arguments)
    # argparse takes no more positional arguments once options have followed the first ones.
    if hasattr(args, "overrides") and not any(argument.startswith("-") for argument in left):
        args.overrides, left = args.overrides + left, []
    if left:
        args.error(f"unknown arguments: {' '.join(left)}")
    return args
