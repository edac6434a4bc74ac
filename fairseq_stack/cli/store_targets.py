"""Store the teacher's targets before a training.

Takes the command line of the training and computes all targets that the training will
use. A training also fills its store itself; this command uses machines that are idle
before it starts. After an interruption the same command resumes.

example:
  fairseq-stack store-targets --config-name librispeech_base --processes 8 \\
    task.data=manifests task.teacher=hubert_base_ls960.pt \\
    +task.target_store=/big/disk/targets
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config-dir", metavar="FOLDER", help="folder of the recipe, as for fairseq-hydra-train")
    parser.add_argument(
        "--config-name", metavar="NAME", required=True,
        help="name of the recipe; without --config-dir its path, or its name in the package's examples",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT",
        help="manifests to store targets for (default: those that the recipe trains and validates on)",
    )  # fmt: skip
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number of processes, such as one for each GPU (default: 1)",
    )
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe to change")


def run(args: Namespace) -> None:
    import logging

    from fairseq_stack.errors import check_positive
    from fairseq_stack.training.recipes import compose_recipe, find_recipe, subsets
    from fairseq_stack.training.stored_targets import store_targets

    check_positive("--processes", args.processes)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("fairseq_stack").setLevel(logging.INFO)
    folder, name = args.config_dir, args.config_name
    if folder is None:
        recipe = find_recipe(name)
        folder, name = recipe.parent, recipe.stem
    cfg = compose_recipe(folder, name, args.overrides)
    store_targets(cfg, args.splits or subsets(cfg.dataset), args.processes)
