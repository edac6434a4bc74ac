"""Measure where the time of an update goes, what growing saves of it, and what else there is takes for the same.

Every case is a real training by fairseq's trainer, in a process of its own. They take turns, update by update, and
medians are compared, because one run's seconds say little. Weights and waveforms are random: that does not change the
time. The teacher runs in bf16; the peers' in fp32, as s3prl's distiller has it.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from fairseq_stack.benchmark.inputs import SIZES
from fairseq_stack.benchmark.measure import measure
from fairseq_stack.benchmark.peers import PEERS
from fairseq_stack.benchmark.tables import tables
from fairseq_stack.errors import one_line_errors

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "interleaved"


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="paper", help="shapes of teacher and student")
    parser.add_argument("--batch", type=int, default=4, help="utterances of an update")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each utterance")
    parser.add_argument("--rounds", type=int, default=5, help="updates measured at each depth")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"],
                        help="of the student")  # fmt: skip
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=[], help="what to compare with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each training, on a CPU")
    parser.add_argument("--output", help="write the figures to this JSON file too")
    arguments = vars(parser.parse_args())
    output, arguments["peers"], arguments["precisions"] = (arguments.pop(name) for name in ("output", "peer", "precision"))
    result = {**measure(RECIPES, **arguments), "torch": torch.__version__, "machine": platform.machine(), **arguments}
    if output:
        Path(output).write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    main()
