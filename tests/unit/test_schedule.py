"""When the stages begin, number by number."""

import pytest

from fairseq_stack.errors import InputError
from fairseq_stack.growth.schedule import stage_at, stage_starts


def test_prop_1_wakes_layers_at_10_30_and_60_percent():
    assert stage_starts("prop", 4, 1000, alpha=1) == (0, 100, 300, 600)


def test_equal_wakes_layers_every_quarter():
    assert stage_starts("equal", 4, 1000) == (0, 250, 500, 750)


def test_prop_0_is_equal():
    assert stage_starts("prop", 4, 1000, alpha=0) == stage_starts("equal", 4, 1000)


def test_prop_2_gives_stages_1_4_9_and_16_shares():
    assert stage_starts("prop", 4, 3000, alpha=2) == (0, 100, 500, 1400)


def test_milestones_are_taken_as_given():
    assert stage_starts("milestones", 4, 1000, milestones=[7, 8, 999]) == (0, 7, 8, 999)


def test_a_single_stage_needs_no_schedule():
    assert stage_starts("prop", 1, 0) == (0,)


def test_a_stage_begins_exactly_at_its_first_update():
    starts = (0, 100, 300, 600)
    assert [stage_at(update, starts) for update in (0, 99, 100, 299, 300, 599, 600, 10_000)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        ("linear", {}, "model.stack_schedule=linear is unknown"),
        ("prop", {"alpha": -1}, "model.stack_alpha=-1 must be 0 or more"),
        ("milestones", {"milestones": [1, 2]}, r"model.stack_milestones=\[1, 2\] has 2 update counts; 4 stages need 3"),
        ("milestones", {"milestones": [3, 2, 5]}, "must be positive and strictly ascending"),
        ("milestones", {"milestones": [2, 2, 5]}, "must be positive and strictly ascending"),
        ("milestones", {"milestones": [0, 2, 5]}, "must be positive and strictly ascending"),
        ("milestones", {"milestones": [1, 2, 1000]}, "reaches beyond optimization.max_update=1000"),
    ],
)
def test_a_bad_schedule_is_refused_with_the_field(schedule, options, message):
    with pytest.raises(InputError, match=message):
        stage_starts(schedule, 4, 1000, **options)


@pytest.mark.parametrize("max_update, message", [(0, "must be set"), (3, "too short"), (9, "too short")])
def test_every_stage_needs_an_update(max_update, message):
    with pytest.raises(InputError, match=message):
        stage_starts("prop", 4, max_update, alpha=3)
