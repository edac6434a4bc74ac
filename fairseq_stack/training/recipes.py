"""Finds recipes and composes them as the training command does."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairseq.dataclass.initialize import add_defaults, hydra_init
from omegaconf import DictConfig, OmegaConf

import fairseq_stack
from fairseq_stack.errors import InputError
from fairseq_stack.extensions import use_extensions

# In a checkout this is a link to the folder beside the package. Otherwise the folder is installed with the package.
EXAMPLES = (Path(fairseq_stack.__file__).parent / "examples").resolve()


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe or of an experiment: the file `name`, or one of the package's examples.

    Args:
        name: a path, or a name such as librispeech_base or stacking/full.

    Raises:
        InputError: no file or example has that name, or several examples have it.
    """
    if Path(name).is_file():
        return Path(name)
    name = f"{name}".removesuffix(".yaml") + ".yaml"
    if Path(name).is_file():
        return Path(name)
    examples = sorted(EXAMPLES.glob("*/*.yaml"))
    found = [path for path in examples if path.match(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(str(path.relative_to(EXAMPLES).with_suffix("")) for path in found or examples)
    raise InputError(f"{name} is no file and {'several' if found else 'none'} of the examples; choose from {known}")


def compose_recipe(config_dir: str | Path, config_name: str, overrides: Iterable[str]) -> DictConfig:
    """Return a recipe as `fairseq-hydra-train` composes it, with all interpolations resolved.

    What its task.extensions register is used from here on (see use_extensions).

    Raises:
        InputError: hydra cannot compose it.
    """
    try:
        from hydra import compose, initialize_config_dir
    except ImportError:  # hydra 1.0, beside fairseq 0.12.2
        from hydra.experimental import compose, initialize_config_dir
    from hydra.errors import HydraException

    fairseq_stack.register()  # adds the fields of task, model and criterion
    hydra_init(config_name)
    try:
        with initialize_config_dir(config_dir=os.path.abspath(config_dir)):
            cfg = compose(config_name=config_name, overrides=list(overrides))
    except HydraException as error:
        first, *others = str(error).splitlines()
        advice = next((f" {line}" for line in others if line.startswith("To append")), "")
        raise InputError(f"{config_dir}/{config_name}: {first}{advice}") from None
    use_extensions(getattr(cfg.task, "extensions", None))
    add_defaults(cfg)
    values: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return DictConfig(values)


def subsets(loading: DictConfig) -> list[str]:
    """Return the names of the datasets that a training loads, from a recipe's section `dataset`."""
    if loading.disable_validation:
        return [loading.train_subset]
    return list(dict.fromkeys([loading.train_subset, *loading.valid_subset.split(",")]))
