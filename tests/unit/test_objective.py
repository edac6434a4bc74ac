"""Which losses can be compared: those that measure the same against the same teacher on the same speech."""

import os
from copy import deepcopy
from dataclasses import fields

import pytest

from fairseq_stack.analysis.objective import DEFAULTS, kinds_of, objective_of, output_objective_of
from fairseq_stack.criterions.layer_distillation import LayerDistillationConfig
from fairseq_stack.tasks.speech_distillation import SpeechDistillationConfig

CONFIG = {
    "task": {"data": "speech", "teacher": "teacher.pt"},
    "criterion": {"_name": "layer_distillation"},
    "dataset": {"valid_subset": "valid"},
    "model": {"stack_method": "interleaved"},
}


def changed(**values):
    config = deepcopy(CONFIG)
    for name, value in values.items():
        group, _, field = name.partition("__")
        config[group][field] = value
    return config


@pytest.mark.parametrize(
    "values, output_too",
    [
        ({"criterion__loss": "l1"}, True),
        ({"criterion__target_normalization": "layer_norm"}, True),
        ({"task__teacher": "other.pt"}, True),
        ({"task__data": "other"}, True),
        ({"dataset__valid_subset": "dev"}, True),
        ({"task__max_sample_size": 32_000}, True),
        ({"criterion__intermediate_weight": 0.1}, False),
        ({"criterion__teacher_layers": [6, 12]}, False),
        ({"criterion__output_weight": 2.0}, False),
        ({"task__mask_prob": 0.65}, False),
    ],
)
def test_what_changes_the_loss_makes_another_kind(values, output_too):
    (field,) = values
    first, second = kinds_of([objective_of(CONFIG), objective_of(changed(**values))])
    assert (first.letter, first.members, second.letter, second.members) == ("A", [0], "B", [1])
    name = field.replace("__", ".")
    assert any(name in kind.fields for kind in (first, second))
    assert (output_objective_of(CONFIG) != output_objective_of(changed(**values))) is output_too


@pytest.mark.parametrize(
    "values",
    [
        {"model__stack_method": "none"},
        {"criterion__intermediate_style": "prediction"},  # where in the student the prediction comes from
        {"task__teacher": os.path.abspath("teacher.pt")},
        {"criterion__loss": "mse", "criterion__intermediate_weight": 0.5},  # a field that is left out has its default
        {"criterion__cosine_weight": 3.0},  # which only l1_cosine has
        {"criterion__unmasked_weight": 3.0},  # nothing is masked
        {"criterion__teacher_layers": [12, 4, 8]},
    ],
)
def test_what_leaves_the_loss_alone_does_not(values):
    (kind,) = kinds_of([objective_of(CONFIG), objective_of(changed(**values))])
    assert kind.letter == "" and kind.members == [0, 1]


def test_layers_without_weight_do_not_count():
    one, other = (changed(criterion__intermediate_weight=0, criterion__teacher_layers=layers) for layers in ([4], [8]))
    assert objective_of(one) == objective_of(other)


def test_runs_of_unknown_configuration_are_a_kind_of_their_own():
    known, unknown = kinds_of([objective_of(CONFIG), objective_of(None), objective_of({"criterion": {}})])
    assert unknown.members == [1, 2] and unknown.fields is None and "not kept" in str(unknown)


def test_kinds_are_told_apart_by_what_differs_alone():
    kinds = kinds_of([objective_of(config) for config in (CONFIG, changed(criterion__loss="l1"), CONFIG)])
    assert [(kind.letter, kind.members, str(kind)) for kind in kinds] == [
        ("A", [0, 2], "criterion.loss=mse"),
        ("B", [1], "criterion.loss=l1"),
    ]


def test_the_defaults_are_those_of_the_dataclasses():
    for group, cls in (("criterion", LayerDistillationConfig), ("task", SpeechDistillationConfig)):
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in fields(cls)
        }
        assert DEFAULTS[group].items() <= defaults.items()
