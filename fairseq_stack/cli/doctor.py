"""Check the installation, the speech and the teacher, and say what to fix.

Prints a line for each check: ok, note (may be in order) or fix. Exits with 1 if
something has to be fixed.
"""


def add_arguments(parser):
    parser.add_argument("--data", metavar="FOLDER", help="folder of manifests, as task.data")
    parser.add_argument(
        "--teacher", metavar="PATH", help="a fairseq checkpoint or Hugging Face folder, as task.teacher"
    )


def run(args):
    from fairseq_stack.doctor import examine

    broken = 0
    for finding in examine(args.data, args.teacher):
        print(finding, flush=True)
        broken += finding.verdict == "fix"
    if broken:
        return f"{broken} to fix"
    print("ready to train")
