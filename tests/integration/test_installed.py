"""What `pip install .` installs: the package with its recipes, and hydra's plugin."""

import os
import shutil
import subprocess
import sys

import pytest
from training import EXAMPLES, ROOT

from fairseq_stack.errors import InputError
from fairseq_stack.training.recipes import find_recipe


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what setuptools installs of a copy of the package, which keeps this folder as it is."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("fairseq_stack", "hydra_plugins", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, source)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build", "--build-lib", site], check=True, cwd=source)
    return site


def test_every_recipe_is_installed_and_found_by_name_from_any_folder(site, tmp_path):
    recipes = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml")}
    installed = site / "fairseq_stack" / "examples"
    assert {str(path.relative_to(installed)) for path in installed.rglob("*.yaml")} == recipes and len(recipes) > 15
    assert (site / "hydra_plugins" / "fairseq_stack_fields" / "__init__.py").exists()
    code = (
        "from fairseq_stack.training.recipes import compose_recipe, find_recipe\n"
        "from fairseq_stack.experiment.grid import read_grid\n"
        "recipe = find_recipe('librispeech_base'); print(recipe)\n"
        "print(compose_recipe(recipe.parent, recipe.stem, ['task.data=x', 'task.teacher=y']).model._name)\n"
        "print(read_grid(find_recipe('methods')).recipe)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        f"{installed}/interleaved/librispeech_base.yaml",
        "stacked_hubert",
        f"{installed}/interleaved/demo.yaml",
    ]


def test_a_recipe_is_a_path_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    assert find_recipe("mine") == find_recipe("./mine").relative_to("") == find_recipe("mine.yaml")
    full = EXAMPLES / "stacking" / "full.yaml"
    assert find_recipe("full") == find_recipe("stacking/full.yaml") == find_recipe("examples/stacking/full") == full
    assert find_recipe(full) == full
    (tmp_path / "full.yaml").touch()
    assert find_recipe("full").resolve() == tmp_path / "full.yaml"
    with pytest.raises(InputError, match="^none.yaml is no file and none of the examples; choose from demo_teacher"):
        find_recipe("none")
