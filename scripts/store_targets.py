"""Store the teacher's targets ahead of a training."""

import argparse
import logging

from fairseq_stack.errors import one_line_errors
from fairseq_stack.targets.fill import store_targets
from fairseq_stack.training.recipes import compose_recipe, subsets

DESCRIPTION = """\
Store the teacher's targets ahead of a training.

Takes the command line of the training, with this script in the place of fairseq-hydra-train, and computes
all targets that the training will ask for. A training fills its store itself as it goes; this is for
machines that have nothing else to do before it starts. Run again, the command continues where it was
stopped.
"""
EXAMPLES = """\
example:
  python scripts/store_targets.py --config-dir examples/interleaved --config-name librispeech_base \\
    --processes 8 task.data=manifests task.teacher=hubert_base_ls960.pt +task.target_store=/big/disk/targets
"""


@one_line_errors
def main():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-dir", required=True, help="folder of the recipe")
    parser.add_argument("--config-name", required=True, help="the recipe")
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT",
        help="manifests to store (default: those that the recipe trains and validates on)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="such as one for each GPU (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="what the training's command line changes"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("fairseq_stack").setLevel(logging.INFO)
    cfg = compose_recipe(args.config_dir, args.config_name, args.overrides)
    store_targets(cfg, args.splits or subsets(cfg.dataset), args.processes)


if __name__ == "__main__":
    main()
