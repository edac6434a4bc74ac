"""python -m fairseq_stack: what the package can do beside fairseq's own commands."""

import argparse
import sys

from fairseq_stack.doctor import examine


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m fairseq_stack", description="Tools of fairseq_stack.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check the installation, the speech and the teacher, and say what to fix",
        description="Check the installation and, where they are given, the speech and the teacher. One line each: ok,"
        " note (may be in order) or fix. Exits with 1 if something has to be fixed.",
    )
    doctor.add_argument("--data", metavar="FOLDER", help="folder of manifests, as task.data")
    doctor.add_argument("--teacher", metavar="PATH", help="a fairseq checkpoint or Hugging Face folder, as task.teacher")
    args = parser.parse_args(arguments)
    broken = 0
    for finding in examine(args.data, args.teacher):
        print(finding, flush=True)
        broken += finding.verdict == "fix"
    if broken:
        sys.exit(f"{broken} to fix")
    print("ready to train")


if __name__ == "__main__":
    main()
