"""Measure the time of an update, how much of it growing saves, and the baselines.

Every case is a real training in its own process. On a CPU the cases take turns, update
by update, and on a GPU they run one after another. The tables compare medians. Cells of
what does not fit into memory stay empty. Weights and waveforms are random. The teacher
runs in bf16, and in fp32 in the baselines, as in s3prl's distiller.
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--size", choices=("paper", "demo"), default="paper", help="shapes of teacher and student")
    parser.add_argument("--batch", type=int, help="utterances (default: 4; --roofline: 64)")
    parser.add_argument("--seconds", type=float, help="of an utterance (default: 8; --roofline: 12)")
    parser.add_argument("--rounds", type=int, default=5, help="updates measured at each depth (default: 5)")
    parser.add_argument(
        "--precision", nargs="*", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"], metavar="P",
        help="of the student: fp32, bf16, fp16; without any, baselines alone (default: fp32 bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--targets", nargs="+", choices=("live", "stored"), default=["live", "stored"],
        metavar="SOURCE", help="where targets come from: live, stored (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--cnn", nargs="+", choices=("trained", "shared"), default=["trained", "shared"],
        metavar="KIND", help="the student's CNN: trained, shared (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--target-format", nargs="+", default=["fp16"], metavar="FORMAT",
        help="fp16, int8, pqN or unitsN (default: fp16)",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", nargs="*", choices=("s3prl", "fairseq"), default=[], help="baselines to measure too"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, help="threads of each training on a CPU (default: as torch)")
    parser.add_argument(
        "--roofline", metavar="GPU",
        help="compute a lower bound for an update on this GPU instead: h100, a100, rtx4090, or a JSON file with the"
             " fields of benchmark.roofline.Gpu",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="write the numbers to this JSON file too")


def run(args: Namespace) -> None:
    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    from fairseq_stack.benchmark.run import run
    from fairseq_stack.training.recipes import find_recipe

    print(run(
        find_recipe("interleaved/librispeech_base").parent, args.size, args.batch, args.seconds, args.rounds,
        args.precision, args.targets, args.cnn, args.target_format, args.baseline, args.device, args.threads,
        args.roofline, args.output,
    ))  # fmt: skip
