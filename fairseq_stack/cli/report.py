"""Report trainings: losses, time per stage, speed-up, similarity of layers, layer weights of probes."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_stack.errors import InputError, check_output, check_positive


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="folder of a training, with tensorboard/ and checkpoints/ in it",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the report to")
    parser.add_argument(
        "--reference", metavar="RUN", type=Path, help="training to compare the time with, such as one at full depth"
    )
    parser.add_argument(
        "--student", type=Path, help="huggingface export of the first run's student, for the similarity of its layers"
    )
    parser.add_argument("--speech", type=Path, help="manifest (TSV) of the speech to run the student on")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of that speech (default: 60)")
    parser.add_argument(
        "--probes", type=Path, help="JSON file of fairseq-stack evaluate, for the layer weights of the probes"
    )


def run(args: Namespace) -> None:
    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.analysis.hidden_states import hidden_states_of
    from fairseq_stack.analysis.probes import read_layer_weights
    from fairseq_stack.analysis.report import write_report
    from fairseq_stack.analysis.runs import read_runs

    if (args.student is None) != (args.speech is None):
        raise InputError("--student and --speech belong together; give both or none")
    check_positive("--seconds", args.seconds)
    check_output("--output", args.output, folder=True)
    runs, reference = read_runs(args.runs, args.reference)
    states = hidden_states_of(args.student, args.speech, args.seconds) if args.student else None
    weights = read_layer_weights(args.probes) if args.probes else None
    print(write_report(runs, args.output, reference, states, weights), end="")
    print(f"report: {args.output / 'index.html'}")
