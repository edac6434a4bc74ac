"""Stages and the seconds of an update, worked out by hand for small trainings."""

import math

import numpy as np
import pytest

from fairseq_stack.analysis.report import speedup, stage_table
from fairseq_stack.analysis.scalars import Series
from fairseq_stack.analysis.stages import Stage, find_stages, seconds_per_update, slowed_stages
from fairseq_stack.errors import InputError


def series(updates, values=None, clock=None, starts=None):
    zeros = np.zeros(len(updates))
    return Series(
        updates=np.array(updates),
        clock=np.array(clock if clock is not None else zeros, dtype=float),
        values=np.array(values if values is not None else zeros, dtype=float),
        starts=np.array(starts if starts is not None else zeros, dtype=int),
    )


def test_growths_at_a_multiple_of_the_log_interval_are_found_exactly():
    updates = list(range(10, 101, 10))
    stage = series(updates, [1, 2, 2, 3, 3, 3, 4, 4, 4, 4])
    depth = series(updates, [3, 6, 6, 9, 9, 9, 12, 12, 12, 12])
    assert find_stages(stage, depth, last_update=104) == [
        Stage(1, 3, 0, 10),
        Stage(2, 6, 10, 30),
        Stage(3, 9, 30, 60),
        Stage(4, 12, 60, 104),
    ]


def test_an_average_over_the_log_interval_gives_the_update_between_two_entries():
    # Update 10 to 20: four updates in stage 1 and six in stage 2.
    updates = [10, 20, 30]
    stage, depth = series(updates, np.float32([1, 1.6, 2])), series(updates, np.float32([3, 4.8, 6]))
    assert find_stages(stage, depth, last_update=30) == [Stage(1, 3, 0, 14), Stage(2, 6, 14, 30)]


def test_a_training_that_does_not_grow_has_one_stage():
    assert find_stages(series([5, 10], [1, 1]), series([5, 10], [12, 12]), 12) == [Stage(1, 12, 0, 12)]


def test_stages_shorter_than_the_log_interval_are_refused_where_none_is_seen_whole():
    with pytest.raises(InputError, match="log_interval"):
        find_stages(series([10], [1.5]), series([10], [4.5]), 10)


def test_seconds_are_those_between_two_entries_of_a_stage_and_a_start():
    stages = [Stage(1, 3, 0, 30), Stage(2, 6, 30, 60)]
    train = series(
        [10, 20, 30, 40, 50, 60],
        clock=[100, 105, 110, 140, 1000, 1008],  # 30 s of growth, then a pause of 860 s between two starts
        starts=[0, 0, 0, 0, 1, 1],
    )
    assert seconds_per_update(stages, train) == [0.5, 0.8]


def test_a_validation_at_a_log_entry_is_taken_off():
    train = series([10, 20, 30], clock=[100, 105, 130])
    valid = series([20, 20], clock=[115, 120])  # takes until 120; 10 s of training remain
    assert seconds_per_update([Stage(1, 12, 0, 30)], train, [valid]) == [15 / 20]


def test_a_stretch_with_a_validation_at_an_unknown_moment_does_not_count():
    train = series([10, 20, 30], clock=[100, 105, 130])
    assert seconds_per_update([Stage(1, 12, 0, 30)], train, [series([25], clock=[120])]) == [0.5]


def test_a_second_validation_subset_is_no_training_time():
    train = series([10, 20, 30], clock=[100, 105, 130])
    valids = [series([20], clock=[115]), series([20], clock=[125])]
    assert seconds_per_update([Stage(1, 12, 0, 30)], train, valids) == [0.5]


def test_a_stretch_that_other_work_has_slowed_down_does_not_move_the_cost():
    train = series([10, 20, 30, 40, 50], clock=[100, 105, 110, 250, 255])
    assert seconds_per_update([Stage(1, 12, 0, 50)], train) == [0.5]


def test_a_shallow_stage_that_is_dearer_than_a_deeper_one_is_named_with_both_times():
    stages = [Stage(1, 3, 0, 10), Stage(2, 6, 10, 30), Stage(3, 12, 30, 60)]
    (sentence,) = slowed_stages(stages, [14.9, 5.0, 5.4])
    assert sentence == "stage 1 took 14.900 s an update with 3 layers, and stage 2 5.000 s with 6"
    assert slowed_stages(stages, [5.0, 5.0, 5.4]) == slowed_stages(stages, [math.nan, math.nan, 5.4]) == []
    assert len(slowed_stages(stages, [math.nan, 5.5, 5.4])) == 1
    assert slowed_stages(stages, [5.41, 5.4, 5.39]) == []  # updates that wait for data


def test_a_stage_with_one_entry_has_no_known_cost():
    stages = [Stage(1, 3, 0, 10), Stage(2, 6, 10, 30)]
    first, second = seconds_per_update(stages, series([10, 20, 30], clock=[1, 3, 8]))
    assert math.isnan(first)
    assert second == 0.5


def test_the_stage_table_by_hand():
    stages = [Stage(1, 3, 0, 1000), Stage(2, 6, 1000, 3000)]
    valid = series([500, 1000, 1500, 3000], [0.9, 0.7, 0.6, 0.4])
    assert stage_table(stages, [0.25, 0.5], valid) == [
        ["1", "3", "1,000", "250.0", "0.250", "0.50", "0.9000", "0.7000"],
        ["2", "6", "2,000", "1,000.0", "0.500", "1.00", "0.6000", "0.4000"],
    ]
    assert stage_table(stages, [math.nan, 0.5])[0] == ["1", "3", "1,000", "–", "–", "–", "–", "–"]


def test_speedup_of_prop_1_is_4_thirds_where_only_the_layers_cost():
    # 4 / (0.1 * 1 + 0.2 * 2 + 0.3 * 3 + 0.4 * 4)
    stages = [Stage(1, 3, 0, 10), Stage(2, 6, 10, 30), Stage(3, 9, 30, 60), Stage(4, 12, 60, 100)]
    assert speedup(stages, [1, 2, 3, 4]) == pytest.approx(4 / 3)
    assert math.isnan(speedup(stages, [1, 2, 3, math.nan])) and math.isnan(speedup(stages, [0, 0, 0, 0]))
