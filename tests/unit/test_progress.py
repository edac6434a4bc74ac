"""Speed, shares and time left, by a clock that the test sets."""

import pytest
from fairseq.logging import metrics
from test_stacked_hubert import tiny_student

from fairseq_stack.training import progress
from fairseq_stack.training.progress import Pace, Progress, timed


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; the seconds to add go to `clock.append`."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: sum(seconds))
    return seconds


def batch(audio, padded):
    return {"audio_samples": audio, "padded_samples": padded}


def test_an_update_is_the_wait_for_its_batches_and_its_work_and_nothing_between_two_updates(clock):
    def batches():
        for wait in (1, 3):
            clock.append(wait)
            yield [batch(8_000, 16_000), batch(16_000, 16_000)]

    training = Progress()
    with metrics.aggregate(new_root=True) as logged:
        for group in timed(batches()):
            counts = [training.count(sample) for sample in group]
            sums = {name: sum(count[name] for count in counts) for name in counts[0]}
            clock.append(2)  # the update
            training.log(sums, depth=3, updates_left={3: 10, 6: 100})
            clock.append(1000)  # a validation
    values = logged.get_smoothed_values()
    # 3 s of audio in 8 s, of which 4 s are waiting; a quarter of 64,000 samples is padding.
    assert values["audio_hours_per_hour"] == round(3 / 8, 1)
    assert values["data_wait_share"] == 0.5 and values["padding_share"] == 0.25
    # The first update warms up; from there to the end of the second it took 1005 s, and there are 110 to come.
    assert values["eta_hours"] == round(110 * 1005 / 3600, 2)


def test_deeper_stages_lie_on_the_line_through_the_two_deepest_that_are_known():
    pace = Pace()
    for depth, seconds in ((3, 1.0), (6, 1.5)):
        pace.observe(depth, 99.0)  # pays for the growth
        for wobble in (-0.1, 0.1):
            pace.observe(depth, seconds + wobble)
        assert pace.predict(depth) == pytest.approx(seconds)
        assert pace.predict(12) == pytest.approx({3: 1.0, 6: 2.5}[depth])
    for depth in (9, 9):
        pace.observe(depth, 1.2)  # a faster machine: deeper is never taken for cheaper
    assert pace.predict(12) == pytest.approx(1.2)


def test_the_pace_follows_a_machine_that_becomes_slower():
    pace = Pace()
    for seconds in [1.0] * 10_001 + [2.0] * 5000:
        pace.observe(12, seconds)
    assert 1.9 < pace.predict(12) <= 2.0


def test_the_updates_left_are_told_by_depth():
    student = tiny_student(max_update=1000)  # PROP-1: growths at 100, 300, 600
    assert student.updates_left(0) == {3: 100, 6: 200, 9: 300, 12: 400}
    assert student.updates_left(40) == {3: 60, 6: 200, 9: 300, 12: 400}
    student.grow_to(3)
    assert student.updates_left(599) == {9: 1, 12: 400} and student.updates_left(600) == {9: 0, 12: 400}
    student.grow_to(4)
    assert student.updates_left(999) == {12: 1} and student.updates_left(1000) == {12: 0}


def test_a_stage_that_a_plateau_began_early_has_the_updates_up_to_the_next_one():
    student = tiny_student(max_update=1000, stack_schedule="plateau")
    student.grow_to(2)
    assert student.updates_left(50) == {6: 250, 9: 300, 12: 400}


def test_without_growth_and_without_an_end_nothing_is_told():
    student = tiny_student(stack_method="none", stack_stages=1, max_update=0)
    assert student.updates_left(5) == {}
