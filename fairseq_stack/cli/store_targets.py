"""Store the teacher's targets ahead of a training.

Takes the command line of the training and computes all targets that the training
will ask for. A training fills its store itself as it goes; this is for machines that
are idle before it starts. The same command continues after an interruption.

example:
  fairseq-stack store-targets --config-name librispeech_base --processes 8 \\
    task.data=manifests task.teacher=hubert_base_ls960.pt \\
    +task.target_store=/big/disk/targets
"""


def add_arguments(parser):
    parser.add_argument("--config-dir", metavar="FOLDER", help="folder of the recipe, as for fairseq-hydra-train")
    parser.add_argument(
        "--config-name", metavar="NAME", required=True,
        help="the recipe; without --config-dir a path, or a name in the package's examples",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT",
        help="manifests to store (default: those that the recipe trains and validates on)",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="such as one for each GPU (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe to change")


def run(args):
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
