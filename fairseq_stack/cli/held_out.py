"""Print how much of the held-out teacher variance a student explains, trained and at its initialisation."""

from argparse import ArgumentParser, Namespace

from fairseq_stack.errors import check_positive


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="fairseq checkpoint of the student")
    parser.add_argument("--speech", required=True, help="manifest of held-out speech, such as FOLDER/test.tsv")
    parser.add_argument(
        "--teacher", help="file or folder of the teacher (default: the one that the student was trained with)"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="seconds of that speech to use (default: %(default)s)"
    )


def run(args: Namespace) -> None:
    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.analysis.held_out import explained_before_and_after, explained_table, read_held_out

    check_positive("--seconds", args.seconds)
    held_out = read_held_out(args.checkpoint, args.speech, args.teacher)
    trained, fresh = explained_before_and_after(held_out, args.seconds)
    print("share of the held-out teacher variance explained (1 is all, 0 is none)")
    print(explained_table(trained, fresh))
