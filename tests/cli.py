"""Run fairseq-stack in this process, as its entry point does."""

from fairseq_stack.cli import main


def fairseq_stack(*arguments):
    """The exit code of a command line, or the line that it ends with; 0 where all is well."""
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code
    return 0
