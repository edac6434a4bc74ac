"""Who is copied where. Letters name the layers of the first model, digits their copies, as in the paper."""

import pytest

from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import plan_growth

INTERLEAVED = {
    (3, 4): [
        "A1 B1 C1",
        "A1 A2 B1 B2 C1 C2",
        "A1 A2 A3 B1 B2 B3 C1 C2 C3",
        "A1 A2 A3 A4 B1 B2 B3 B4 C1 C2 C3 C4",
    ],
    (2, 3): ["A1 B1", "A1 A2 B1 B2", "A1 A2 A3 B1 B2 B3"],
    (4, 3): [
        "A1 B1 C1 D1",
        "A1 A2 B1 B2 C1 C2 D1 D2",
        "A1 A2 A3 B1 B2 B3 C1 C2 C3 D1 D2 D3",
    ],
}


def names_of(plan, first):
    """Write a plan in the paper's notation: every layer by its ancestor and the order of its birth."""
    names = {seat: f"{letter}1" for seat, letter in zip(plan.stages[0], first)}
    born = {letter: 1 for letter in first}
    stages = [" ".join(names[seat] for seat in plan.stages[0])]
    for growth, seats in zip(plan.growths, plan.stages[1:]):
        for source, woken in growth:
            letter = names[source][0]
            born[letter] += 1
            names[woken] = f"{letter}{born[letter]}"
        stages.append(" ".join(names[seat] for seat in seats))
    return stages


@pytest.mark.parametrize("block, stages", INTERLEAVED)
def test_interleaved_growth_is_the_papers(block, stages):
    plan = plan_growth("interleaved", block * stages, stages)
    assert names_of(plan, "ABCD"[:block]) == INTERLEAVED[block, stages]


def test_one_layer_is_copied_behind_its_newest_copy():
    plan = plan_growth("interleaved", 12, 12)
    assert plan.stages[0] == (0,) and plan.stages[11] == tuple(range(12))
    assert plan.growths == tuple(((seat, seat + 1),) for seat in range(11))


def test_seats_of_the_papers_student_are_final_from_the_start():
    plan = plan_growth("interleaved", 12, 4)
    assert plan.depths == (3, 6, 9, 12)
    assert plan.stages[:2] == ((0, 4, 8), (0, 1, 4, 5, 8, 9))
    assert plan.growths == (
        ((0, 1), (4, 5), (8, 9)),
        ((1, 2), (5, 6), (9, 10)),
        ((2, 3), (6, 7), (10, 11)),
    )


def test_without_growth_all_layers_train_from_the_start():
    plan = plan_growth("none", 12, 1)
    assert plan.stages == (tuple(range(12)),) and plan.growths == ()


@pytest.mark.parametrize(
    "method, layers, stages, message",
    [
        ("interleaved", 10, 4, "model.encoder_layers=10 is not divisible by model.stack_stages=4"),
        ("interlaced", 12, 4, "model.stack_method=interlaced is unknown; choose from none, interleaved"),
        ("none", 12, 4, "model.stack_stages=4 has no meaning with model.stack_method=none"),
        ("interleaved", 12, 0, "model.stack_stages=0 must be at least 1"),
    ],
)
def test_impossible_growth_is_refused_with_the_reason(method, layers, stages, message):
    with pytest.raises(InputError, match=message):
        plan_growth(method, layers, stages)
