"""Measure where the time of an update goes and what growing saves of it, beside baselines.

Every case is a real training by fairseq's trainer, in a process of its own. On a CPU
they take turns, update by update; on a GPU, which each needs as a whole, they come one
after another. Medians are compared. A case that does not fit into memory is named, and
its cells stay empty. Weights and waveforms are random, which does not change the time.
The teacher runs in bf16, that of the baselines in fp32 as in s3prl's distiller.
"""


def add_arguments(parser):
    parser.add_argument("--size", choices=("paper", "demo"), default="paper", help="shapes of teacher and student")
    parser.add_argument("--batch", type=int, help="utterances of an update (default: 4, with --roofline 64)")
    parser.add_argument("--seconds", type=float, help="length of each utterance (default: 8, with --roofline 12)")
    parser.add_argument("--rounds", type=int, default=5, help="updates measured at each depth (default: 5)")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"],
        help="of the student (default: fp32 bf16)",
    )  # fmt: skip
    parser.add_argument("--peer", nargs="*", choices=("s3prl", "fairseq"), default=[], help="what to compare with")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, help="of each training, on a CPU (default: as torch)")
    parser.add_argument(
        "--roofline", metavar="GPU",
        help="measure nothing; bound the time of an update on a GPU, without one: h100, a100, rtx4090, or a JSON file"
             " with the fields of benchmark.roofline.Gpu",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="write the figures to this JSON file too")


def run(args):
    from fairseq_stack.benchmark.run import run
    from fairseq_stack.training.recipes import find_recipe

    print(run(
        find_recipe("interleaved/librispeech_base").parent, args.size, args.batch, args.seconds, args.rounds,
        args.precision, args.peer, args.device, args.threads, args.roofline, args.output,
    ))  # fmt: skip
