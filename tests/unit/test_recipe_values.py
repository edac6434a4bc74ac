"""Every recipe in examples/ composes to the values in tests/golden/recipes.yaml."""

from pathlib import Path

import pytest
import yaml
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from omegaconf import OmegaConf, open_dict
from training import EXAMPLES, composed

import fairseq_stack

GOLDEN = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[1] / "golden/recipes.yaml"))
SHARED = GOLDEN.pop("shared")
WITHOUT_BASE = ("interleaved/librispeech_base", "interleaved/demo", "finetuning/ctc", "demo_teacher/hubert_demo")
BASES = {"interleaved/demo_fast": "demo", "finetuning/ctc_short": "ctc"}  # the others have librispeech_base
GOLDEN_IS_COMPLETE = (*WITHOUT_BASE[1:], *BASES, "distillation/distilhubert")


def test_the_golden_file_has_every_recipe():
    recipes = [path.relative_to(EXAMPLES).with_suffix("") for path in EXAMPLES.glob("*/*.yaml")]
    assert sorted(GOLDEN) == sorted(str(recipe) for recipe in recipes if recipe.parent.name != "experiments")


@pytest.mark.parametrize("recipe", GOLDEN)
def test_the_recipe_composes_to_its_golden_values(recipe):
    fairseq_stack.register()
    folder, name = recipe.split("/")
    golden = OmegaConf.merge({} if recipe in GOLDEN_IS_COMPLETE else SHARED, GOLDEN[recipe])
    hydra_of_golden = golden.pop("hydra", {})

    hydra_init(name)
    cfg = composed(name, [], folder, return_hydra_config=True)
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    assert _values(cfg) == _values(OmegaConf.merge(OmegaConf.structured(FairseqConfig), golden))
    assert OmegaConf.to_container(OmegaConf.merge(hydra, hydra_of_golden)) == OmegaConf.to_container(hydra)


@pytest.mark.parametrize("recipe", [recipe for recipe in GOLDEN if recipe not in WITHOUT_BASE])
def test_the_recipe_says_only_what_differs_from_its_base(recipe):
    folder, name = recipe.split("/")
    own, changes = ((EXAMPLES / folder / file).read_text() for file in (f"{name}.yaml", f"changes/{name}.yaml"))
    base = BASES.get(recipe, "librispeech_base")
    # The base would override a field here, because it comes after `_self_`.
    assert yaml.safe_load(own) == {"defaults": ["_self_", f"base/{base}", f"changes/{name}"]}
    assert len(own.splitlines()) + len(changes.splitlines()) <= 15


def _values(cfg):
    """All fields of a configuration, with fairseq's and our own defaults where it says nothing."""
    add_defaults(cfg)
    return OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
