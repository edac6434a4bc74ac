"""Compare the sizes and speeds of exports, and of a teacher.

The models compute the same utterance one after the other, in several runs. The fastest
run of each counts, because other work on the machine only slows runs down. The first
export is the reference.

examples:
  fairseq-stack cost student.onnx student_int8.onnx --teacher teacher.pt
"""

from argparse import ArgumentParser, Namespace

from fairseq_stack.errors import check_positive


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "exports", nargs="+", metavar="EXPORT",
        help="an export by fairseq-stack: an ONNX file, a huggingface folder, or a file for s3prl",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", metavar="PATH",
        help="add the teacher: a fairseq checkpoint (needs fairseq) or a folder in Hugging Face's format",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="cores to compute on (default: 1)")
    parser.add_argument("--seconds", type=int, default=10, metavar="N", help="length of the utterance (default: 10)")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="timed runs (default: 7)")


def run(args: Namespace) -> None:
    from fairseq_stack.cli.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from fairseq_stack.evaluation.cost import cost_table

    for option in ("threads", "seconds", "runs"):
        check_positive(f"--{option}", getattr(args, option))
    torch.set_num_threads(args.threads)
    print(cost_table(args.exports, args.teacher, args.seconds, args.runs))
