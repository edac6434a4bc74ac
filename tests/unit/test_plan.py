"""Who is copied where. Letters name the layers of the first model, digits their copies, as in the paper."""

import pytest

from fairseq_stack.errors import InputError
from fairseq_stack.growth.plan import METHODS, plan_growth

# (K, B) -> the stack of every stage, bottom to top. K is the depth of the first stage; the finished
# student has K * B layers, or K * 2 ** (B - 1) with stackbert.
STACKS = {
    ("interleaved", 3, 4): [
        "A1 B1 C1",
        "A1 A2 B1 B2 C1 C2",
        "A1 A2 A3 B1 B2 B3 C1 C2 C3",
        "A1 A2 A3 A4 B1 B2 B3 B4 C1 C2 C3 C4",
    ],
    ("interleaved", 2, 3): ["A1 B1", "A1 A2 B1 B2", "A1 A2 A3 B1 B2 B3"],
    ("interleaved", 4, 3): [
        "A1 B1 C1 D1",
        "A1 A2 B1 B2 C1 C2 D1 D2",
        "A1 A2 A3 B1 B2 B3 C1 C2 C3 D1 D2 D3",
    ],
    ("interleaved", 1, 12): [" ".join(f"A{copy}" for copy in range(1, depth + 1)) for depth in range(1, 13)],
    ("gradual", 3, 4): [
        "A1 B1 C1",
        "A1 B1 C1 A2 B2 C2",
        "A1 B1 C1 A2 B2 C2 A3 B3 C3",
        "A1 B1 C1 A2 B2 C2 A3 B3 C3 A4 B4 C4",
    ],
    ("gradual", 2, 3): ["A1 B1", "A1 B1 A2 B2", "A1 B1 A2 B2 A3 B3"],
    ("gradual", 4, 3): [
        "A1 B1 C1 D1",
        "A1 B1 C1 D1 A2 B2 C2 D2",
        "A1 B1 C1 D1 A2 B2 C2 D2 A3 B3 C3 D3",
    ],
    ("gradual", 1, 12): [" ".join(f"A{copy}" for copy in range(1, depth + 1)) for depth in range(1, 13)],
    ("midas", 3, 4): [
        "A1 B1 C1",
        "A1 B1 C1 A2 B2 C2",
        "A1 B1 C1 A3 B3 C3 A2 B2 C2",
        "A1 B1 C1 A3 B3 C3 A4 B4 C4 A2 B2 C2",
    ],
    ("midas", 2, 3): ["A1 B1", "A1 B1 A2 B2", "A1 B1 A3 B3 A2 B2"],
    ("midas", 4, 3): [
        "A1 B1 C1 D1",
        "A1 B1 C1 D1 A2 B2 C2 D2",
        "A1 B1 C1 D1 A3 B3 C3 D3 A2 B2 C2 D2",
    ],
    ("midas", 1, 12): [
        "A1",
        "A1 A2",
        "A1 A3 A2",
        "A1 A3 A4 A2",
        "A1 A3 A5 A4 A2",
        "A1 A3 A5 A6 A4 A2",
        "A1 A3 A5 A7 A6 A4 A2",
        "A1 A3 A5 A7 A8 A6 A4 A2",
        "A1 A3 A5 A7 A9 A8 A6 A4 A2",
        "A1 A3 A5 A7 A9 A10 A8 A6 A4 A2",
        "A1 A3 A5 A7 A9 A11 A10 A8 A6 A4 A2",
        "A1 A3 A5 A7 A9 A11 A12 A10 A8 A6 A4 A2",
    ],
    ("stackbert", 3, 3): [
        "A1 B1 C1",
        "A1 B1 C1 A2 B2 C2",
        "A1 B1 C1 A2 B2 C2 A3 B3 C3 A4 B4 C4",
    ],
    ("stackbert", 2, 3): ["A1 B1", "A1 B1 A2 B2", "A1 B1 A2 B2 A3 B3 A4 B4"],
    ("stackbert", 1, 4): ["A1", "A1 A2", "A1 A2 A3 A4", "A1 A2 A3 A4 A5 A6 A7 A8"],
    ("stackbert", 4, 2): ["A1 B1 C1 D1", "A1 B1 C1 D1 A2 B2 C2 D2"],
    ("gstack", 3, 4): ["A1 B1 C1", "A1 B1 C1 A2 B2 C2 A3 B3 C3 A4 B4 C4"],
    ("gstack", 2, 3): ["A1 B1", "A1 B1 A2 B2 A3 B3"],
    ("gstack", 1, 12): ["A1", "A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12"],
    ("gstack", 4, 3): ["A1 B1 C1 D1", "A1 B1 C1 D1 A2 B2 C2 D2 A3 B3 C3 D3"],
}

# Names do not tell which copy of a letter was copied; the pairs (source seat, woken seat) do.
GROWTHS = {
    ("interleaved", 12, 4): (
        ((0, 1), (4, 5), (8, 9)),
        ((1, 2), (5, 6), (9, 10)),
        ((2, 3), (6, 7), (10, 11)),
    ),
    ("gradual", 12, 4): (
        ((0, 3), (1, 4), (2, 5)),
        ((3, 6), (4, 7), (5, 8)),
        ((6, 9), (7, 10), (8, 11)),
    ),
    ("midas", 12, 4): (
        ((0, 9), (1, 10), (2, 11)),
        ((0, 3), (1, 4), (2, 5)),
        ((3, 6), (4, 7), (5, 8)),
    ),
    ("midas", 12, 12): (
        ((0, 11),), ((0, 1),), ((1, 10),), ((1, 2),), ((2, 9),), ((2, 3),),
        ((3, 8),), ((3, 4),), ((4, 7),), ((4, 5),), ((5, 6),),
    ),
    ("stackbert", 12, 3): (
        ((0, 3), (1, 4), (2, 5)),
        ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)),
    ),
    ("gstack", 12, 4): (
        ((0, 3), (0, 6), (0, 9), (1, 4), (1, 7), (1, 10), (2, 5), (2, 8), (2, 11)),
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("method, block, stages", STACKS)
def test_every_stage_is_the_stack_of_the_methods_paper(method, block, stages):
    layers = block * 2 ** (stages - 1) if method == "stackbert" else block * stages
    plan = plan_growth(method, layers, stages)
    assert names_of(plan, "ABCD"[:block]) == STACKS[method, block, stages]


@pytest.mark.parametrize("method, layers, stages", GROWTHS)
def test_every_layer_is_copied_from_the_layer_that_the_method_names(method, layers, stages):
    assert plan_growth(method, layers, stages).growths == GROWTHS[method, layers, stages]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
@pytest.mark.parametrize("layers, stages", [(12, 2), (12, 3), (8, 4), (24, 4), (16, 2)])
def test_a_growth_wakes_idle_seats_with_copies_of_layers_from_before_it(method, layers, stages):
    plan = plan_growth(method, layers, stages)
    for growth, before, after in zip(plan.growths, plan.stages, plan.stages[1:]):
        assert all(source in before for source, _ in growth)
        assert sorted(woken for _, woken in growth) == sorted(set(after) - set(before))
        assert set(before) < set(after) and list(after) == sorted(after)
    assert plan.stages[-1] == tuple(range(layers))


def test_one_layer_is_copied_behind_its_newest_copy():
    plan = plan_growth("interleaved", 12, 12)
    assert plan.stages[0] == (0,) and plan.stages[11] == tuple(range(12))
    assert plan.growths == tuple(((seat, seat + 1),) for seat in range(11))


def test_seats_of_the_papers_student_are_final_from_the_start():
    plan = plan_growth("interleaved", 12, 4)
    assert plan.depths == (3, 6, 9, 12)
    assert plan.stages[:2] == ((0, 4, 8), (0, 1, 4, 5, 8, 9))


def test_seats_of_midas_leave_room_in_the_middle():
    plan = plan_growth("midas", 12, 4)
    assert plan.stages[:3] == ((0, 1, 2), (0, 1, 2, 9, 10, 11), (0, 1, 2, 3, 4, 5, 9, 10, 11))


@pytest.mark.parametrize("method, stages, depths", [("stackbert", 3, (3, 6, 12)), ("gstack", 4, (3, 12))])
def test_doubling_and_jumping_have_their_own_depths(method, stages, depths):
    assert plan_growth(method, 12, stages).depths == depths


def test_without_growth_all_layers_train_from_the_start():
    plan = plan_growth("none", 12, 1)
    assert plan.stages == (tuple(range(12)),) and plan.growths == ()


@pytest.mark.parametrize(
    "method, layers, stages, message",
    [
        ("interleaved", 10, 4, "model.encoder_layers=10 is not divisible by model.stack_stages=4"),
        ("interleaved", 10, 4, "as model.stack_method=interleaved needs"),
        ("gradual", 10, 4, "by model.stack_stages=4, as model.stack_method=gradual needs"),
        ("midas", 12, 5, "by model.stack_stages=5, as model.stack_method=midas needs"),
        ("gstack", 12, 7, "by model.stack_stages=7, as model.stack_method=gstack needs"),
        ("stackbert", 12, 4, r"encoder_layers=12 is not divisible by 2 \*\* \(model.stack_stages=4 - 1\)"),
        ("stackbert", 12, 4, "as model.stack_method=stackbert needs"),
        ("interlaced", 12, 4, "model.stack_method=interlaced is unknown; choose from none, interleaved"),
        ("none", 12, 4, "model.stack_stages=4 has no meaning with model.stack_method=none"),
        ("interleaved", 12, 0, "model.stack_stages=0 must be at least 1"),
    ],
)
def test_impossible_growth_is_refused_with_the_reason(method, layers, stages, message):
    with pytest.raises(InputError, match=message):
        plan_growth(method, layers, stages)
