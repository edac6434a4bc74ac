"""The grid of an experiment: a recipe and the fields that each student changes."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from fairseq_stack.errors import InputError
from fairseq_stack.training.recipes import find_recipe

# These fields do not change the cost of an update at a depth; optimizer._name does.
_SAME_COST = re.compile(r"\+*(model\.stack_|criterion\.|optimization\.|optimizer\.(?!_name)|lr_scheduler\.)")


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
        recipe: path of a recipe, such as examples/interleaved/demo.yaml.
        fields: FIELD=VALUE for all students, as on fairseq-hydra-train's command line.
        students: {name: FIELD=VALUE for this student}.
        reference: the student that the others are compared with.
        seeds: every student is trained with each.
    """

    recipe: Path
    fields: tuple[str, ...]
    students: dict[str, tuple[str, ...]]
    reference: str
    seeds: tuple[int, ...]

    def cost_group(self, student: str) -> tuple[str, ...]:
        """Returns the fields that change the cost of an update at a depth. Students with the same ones share times."""
        return tuple(sorted(field for field in self.students[student] if not _SAME_COST.match(field)))


def read_grid(path: str | Path) -> Grid:
    """Reads the YAML file of an experiment, which has the fields of Grid.

    `recipe` is relative to the file, or one of the package's examples.

    Raises:
        InputError: the file cannot be read, or a field is missing, unknown or of the wrong type.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {(str(error).splitlines() or [''])[0]}") from None
    names = ("recipe", "fields", "students", "reference", "seeds")
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise InputError(f"{path} must have the fields {', '.join(names)}, and no others")
    recipe, students, seeds = path.parent / str(content["recipe"]), content["students"], content["seeds"]
    if not recipe.is_file():
        try:
            recipe = find_recipe(content["recipe"])
        except InputError as error:
            raise InputError(f"{path}: recipe={content['recipe']} does not exist in {path.parent}: {error}") from None
    if not isinstance(students, dict) or not students:
        raise InputError(f"{path}: students must map names to lists of fields")
    for name in students:
        if not re.fullmatch(r"[a-z0-9_]+", str(name)):
            raise InputError(f"{path}: students.{name} must be a name of a-z, 0-9 and _, because it names a folder")
    if content["reference"] not in students:
        raise InputError(f"{path}: reference={content['reference']} is none of the students {', '.join(students)}")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{path}: seeds={seeds} must be a list of whole numbers")
    return Grid(
        recipe.resolve(),
        _fields(path, "fields", content["fields"]),
        {name: _fields(path, f"students.{name}", fields) for name, fields in students.items()},
        content["reference"],
        tuple(seeds),
    )


def _fields(path, name, fields):
    if not isinstance(fields, list) or not all(isinstance(field, str) and "=" in field for field in fields):
        raise InputError(f"{path}: {name} must be a list of FIELD=VALUE, as fairseq-hydra-train takes them")
    return tuple(fields)
