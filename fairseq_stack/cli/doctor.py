"""Check the installation, the speech and the teacher, and say what to fix.

Prints a line for each check: ok, note (may be fine) or fix. Exits with 1 if something
has to be fixed.
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="folder of manifests, as task.data")
    parser.add_argument(
        "--teacher", metavar="PATH", help="a fairseq checkpoint or Hugging Face folder, as task.teacher"
    )


def run(args: Namespace) -> str | None:
    from fairseq_stack.doctor import examine

    broken = 0
    for finding in examine(args.data, args.teacher):
        print(finding, flush=True)
        broken += finding.verdict == "fix"
    if broken:
        return f"{broken} to fix"
    print("ready to train")
    return None
