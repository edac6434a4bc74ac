"""Measure where the time of an update goes, what growing saves of it, and what else there is takes for the same.

Every case is a real training by fairseq's trainer, in a process of its own. On a CPU they take turns, update by update,
and on a GPU they come one after another, so that each has all of its memory. Medians are compared, because one run's
seconds say little. A case that does not fit into memory is named, and its cells stay empty. Weights and waveforms are
random: that does not change the time. The teacher runs in bf16; the peers' in fp32, as s3prl's distiller has it.
"""

import argparse
import importlib.util
import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from fairseq_stack.benchmark.inputs import SIZES, teacher_shape
from fairseq_stack.benchmark.measure import measure
from fairseq_stack.benchmark.peers import PEERS
from fairseq_stack.benchmark.roofline import GPUS, named_gpu, roofline_tables, rooflines
from fairseq_stack.benchmark.tables import tables
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError, check_output, check_positive, one_line_errors
from fairseq_stack.models.conv_geometry import parse_conv_layers, receptive_field

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "interleaved"


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="paper", help="shapes of teacher and student")
    parser.add_argument("--batch", type=int, help="utterances of an update (default: 4, with --roofline 64)")
    parser.add_argument("--seconds", type=float, help="length of each utterance (default: 8, with --roofline 12)")
    parser.add_argument("--rounds", type=int, default=5, help="updates measured at each depth")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"],
                        help="of the student")  # fmt: skip
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=[], help="what to compare with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to train")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each training, on a CPU")
    parser.add_argument("--roofline", metavar="GPU",
                        help=f"measure nothing; bound the time of an update on a GPU, without one: {', '.join(GPUS)}, or a"
                        " JSON file with the fields of benchmark.roofline.Gpu")  # fmt: skip
    parser.add_argument("--output", help="write the figures to this JSON file too")
    arguments = vars(parser.parse_args())
    gpu = arguments.pop("roofline")
    for name, value, on_gpu in (("batch", 4, 64), ("seconds", 8.0, 12.0)):
        if arguments[name] is None:
            arguments[name] = on_gpu if gpu else value
    if gpu:
        arguments["device"] = None  # a pretended one
    check(**arguments)
    output, arguments["peers"], arguments["precisions"] = (arguments.pop(name) for name in ("output", "peer", "precision"))
    if gpu:
        gpu = named_gpu(gpu)
        logging.disable(logging.WARNING)
        shared = {name: arguments[name] for name in ("size", "batch", "seconds", "precisions", "peers")}
        result = {"cases": rooflines(RECIPES, gpu=gpu, **shared), "gpu": asdict(gpu), **shared}
        text = roofline_tables(result["cases"], shared["size"], shared["batch"])
    else:
        result = {**measure(RECIPES, **arguments), "torch": torch.__version__, "machine": platform.machine(), **arguments}
        text = tables(result)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(text)


def check(batch, seconds, rounds, precision, peer, device, threads, output, size):
    """Raise an InputError unless the options' values can be measured."""
    for option, value in (("--batch", batch), ("--seconds", seconds), ("--rounds", rounds), ("--threads", threads)):
        check_positive(option, value)
    frame = receptive_field(parse_conv_layers(teacher_shape(size)["conv_feature_layers"]))
    if round(seconds * SAMPLE_RATE) < frame:
        raise InputError(f"--seconds {seconds} is shorter than a frame; give {frame / SAMPLE_RATE} or more")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU that it can use; give --device cpu")
    if device == "cpu" and "fp16" in precision:
        raise InputError("--precision fp16 needs a GPU; give fp32 or bf16")
    if "s3prl" in peer and importlib.util.find_spec("s3prl") is None:
        raise InputError("--peer s3prl: s3prl is not installed; leave it out, or install what constraints.txt names")
    if output:
        check_output("--output", output)


if __name__ == "__main__":
    main()
