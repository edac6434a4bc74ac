"""When the stages begin, number by number."""

import pytest

from fairseq_stack.errors import InputError
from fairseq_stack.growth.schedule import Plateau, stage_at, stage_starts


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


def test_plateau_ends_its_stages_no_later_than_prop():
    assert stage_starts("plateau", 4, 1000, alpha=1) == (0, 100, 300, 600)


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
        ("prop", {"alpha": -1}, "model.stack_alpha=-1 must lie between 0 and 100"),
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


def reached_after(losses, every=100, **fields):
    """The updates at which the plateau is reached, of losses validated every 100 updates."""
    plateau = Plateau(**fields)
    reached = []
    for number, loss in enumerate(losses, start=1):
        plateau.observe(number * every, loss)
        if plateau.reached:
            reached.append(number * every)
    return reached


def test_a_falling_loss_never_ends_a_stage():
    assert reached_after([9.0, 8.0, 7.0, 6.5, 6.4, 6.3], patience=1) == []


def test_a_rising_loss_ends_a_stage_after_the_patience():
    assert reached_after([5.0, 5.1, 5.2, 5.3], patience=3) == [400]
    assert reached_after([5.0, 5.1, 5.2, 5.3], patience=1) == [200, 300, 400]


def test_a_flat_loss_is_one_that_stopped_falling():
    assert reached_after([5.0, 5.0, 5.0], patience=2) == [300]


def test_a_new_best_loss_starts_the_wait_again():
    # 200 and 300 wait, 400 is a new best, 500 is worse than the best though better than 300; then it rises.
    assert reached_after([5.0, 5.2, 5.1, 4.9, 5.0, 5.1, 5.2], patience=3) == [700]


def test_a_loss_that_is_no_number_is_no_better_one():
    assert reached_after([5.0, float("nan"), float("nan")], patience=2) == [300]


def test_the_floor_holds_a_stage_open_but_the_wait_counts():
    assert reached_after([5.0, 5.1, 5.2, 5.3, 5.4, 5.5], patience=2, min_updates=500) == [500, 600]


def test_the_floor_counts_from_the_start_of_the_stage():
    plateau = Plateau(patience=1, min_updates=200)
    plateau.begin(1000)
    for update, loss in ((1100, 5.0), (1150, 5.1)):
        plateau.observe(update, loss)
    assert not plateau.reached
    plateau.observe(1200, 5.1)
    assert plateau.reached


def test_only_the_first_validation_subset_counts():
    plateau = Plateau(patience=1)
    for update in (100, 200):
        plateau.observe(update, 5.0 - update / 1000)
        plateau.observe(update, 9.0)
    assert not plateau.reached


def test_a_new_stage_may_begin_with_a_higher_loss():
    plateau = Plateau(patience=1)
    for update, loss in ((100, 5.0), (200, 5.1)):
        plateau.observe(update, loss)
    assert plateau.reached
    plateau.begin(200)
    assert not plateau.reached
    plateau.observe(300, 7.0)
    assert not plateau.reached
    plateau.observe(400, 7.1)
    assert plateau.reached


def test_a_plateau_goes_on_from_its_saved_state():
    losses = [5.0, 5.2, 4.9, 5.0, 5.1, 5.2]
    whole, first = Plateau(patience=3), Plateau(patience=3)
    for number, loss in enumerate(losses):
        whole.observe(number, loss)
        if number < 4:
            first.observe(number, loss)
    second = Plateau(patience=3)
    second.state = first.state
    for number, loss in list(enumerate(losses))[4:]:
        second.observe(number, loss)
    assert second == whole and whole.reached


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patience": 0}, "model.stack_patience=0 must be at least 1"),
        ({"patience": 1, "min_updates": -1}, "model.stack_min_updates=-1 must be 0 or more"),
    ],
)
def test_a_bad_plateau_is_refused_with_the_field(fields, message):
    with pytest.raises(InputError, match=message):
        Plateau(**fields)
