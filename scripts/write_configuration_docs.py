"""Write docs/configuration.md from the help texts of the configuration's fields."""

import dataclasses
from pathlib import Path

from omegaconf import MISSING

from fairseq_stack.criterions.layer_distillation import LayerDistillationConfig
from fairseq_stack.models.stacked_hubert import StackedHubertConfig
from fairseq_stack.tasks.speech_distillation import SpeechDistillationConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
GROUPS = {"task": SpeechDistillationConfig, "model": StackedHubertConfig, "criterion": LayerDistillationConfig}
INTRODUCTION = """\
# Fields of a configuration

These are the fields that this package adds to fairseq's. `python scripts/write_configuration_docs.py` writes this page
from the help texts in the code.

A recipe names some fields of the five groups `task`, `model`, `criterion`, `optimizer` and `lr_scheduler`. To set a
field that neither the recipe nor its base names, put a plus before it: `+task.mask_prob=0.65`. Fields of all other
groups (`common`, `dataset`, `optimization`, `checkpoint`, ...) never need a plus: `checkpoint.patience=5`. To change
the optimizer or the schedule, remove the fields that the new one does not have:
`lr_scheduler._name=cosine ~lr_scheduler.total_num_update`.

Several fields belong to fairseq and are used here in a special way:

- `dataset.train_subset` and `dataset.valid_subset` name subsets: one, or several in quotes
  (`dataset.train_subset="'a,b'"`). The training subsets are joined. Each validation subset is reported separately.
- `optimization.max_update` is the length of the whole training. The stages are shares of it.
- `common.fp16`, `common.bf16` and `common.amp` choose the student's precision. fp16 needs a GPU.
"""


def page() -> str:
    """The page as text."""
    return "\n".join([INTRODUCTION, *(_section(group, config) for group, config in GROUPS.items())])


def _section(group: str, config: type) -> str:
    rows = [f"## {group}\n", "| field | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        if "help" in field.metadata:  # other fields take their value from another group
            rows.append(f"| `{group}.{field.name}` | {_default(field)} | {field.metadata['help']} |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field) -> str:
    make = field.default_factory
    value = field.default if make is dataclasses.MISSING else make()
    if value == MISSING:
        return "required"
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
