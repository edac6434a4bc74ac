"""The benchmark measures what it says; how fast a machine is, no test says."""

import json
import re

import pytest
import torch
from hungry import Counter, Doomed, Hungry
from training import EXAMPLES, ROOT

from fairseq_stack.benchmark.baselines import FairseqModules, S3prlDistiller
from fairseq_stack.benchmark.clock import REST, Clock
from fairseq_stack.benchmark.inputs import TEACHER, make_inputs
from fairseq_stack.benchmark.measure import growing, measure_each, with_first_epoch
from fairseq_stack.benchmark.ours import Case, Ours, fill_store
from fairseq_stack.benchmark.tables import benchmark_tables
from fairseq_stack.benchmark.workers import peak_memory, workers
from fairseq_stack.cli import main
from fairseq_stack.teachers import load_teacher

RECIPES = EXAMPLES / "interleaved"
BATCH, SECONDS, UPDATES = 2, 1.0, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    make_inputs(folder, "demo", SECONDS, BATCH * UPDATES)
    return folder


def test_growing_costs_the_mean_over_the_schedules_shares():
    linear = {3: 3.0, 6: 6.0, 9: 9.0, 12: 12.0}
    assert growing(linear, "prop") == pytest.approx(9.0) and growing(linear, "equal") == pytest.approx(7.5)
    fixed = {3: 15.0, 6: 18.0, 9: 21.0, 12: 24.0}
    assert growing(fixed, "prop") == pytest.approx(0.1 * 15 + 0.2 * 18 + 0.3 * 21 + 0.4 * 24)


def test_the_first_of_75_epochs_is_live_and_lies_in_the_first_stage():
    stored, live = {3: 1.0, 6: 1.0, 9: 1.0, 12: 1.0}, {3: 2.5, 6: 9.0, 9: 9.0, 12: 9.0}
    assert with_first_epoch(stored, live) == pytest.approx((74 * 1.0 + 2.5) / 75)


def test_a_clock_counts_a_part_within_a_part_once():
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    clock = Clock(torch.device("cpu"), now=lambda: now[0])
    clock.restart()
    pass_time(1)
    with clock("outer"):
        pass_time(2)
        with clock("inner"):
            pass_time(4)
        pass_time(8)
    assert clock.stop() == {REST: 1, "outer": 10, "inner": 4}


@pytest.mark.parametrize("cnn, targets", [("trained", "fp16"), ("shared", "fp16"), ("trained", "pq4")])
def test_with_stored_targets_neither_the_teacher_nor_a_shared_cnn_runs(inputs, cnn, targets):
    case = Case("fp32", targets, cnn)
    given = RECIPES, inputs, "demo", BATCH, "cpu"
    fill_store(*given, case)
    ours = Ours(*given, case)
    ran = []
    if cnn == "shared":  # which starts from the teacher's
        ours.task.teacher.loaded.model.register_forward_hook(lambda *_: ran.append("teacher"))
        ours.task.teacher.loaded.model.feature_extractor.register_forward_hook(lambda *_: ran.append("teacher's CNN"))
    ours.model.feature_extractor.register_forward_hook(lambda *_: ran.append("CNN"))
    for depth in (3, 12, 6):
        layers = []
        hooks = [layer.register_forward_hook(lambda *_: layers.append(1)) for layer in ours.model.encoder.layers]
        parts = ours.update(depth)
        assert len(layers) == depth == ours.model.depth
        assert {"data", "targets", "student transformer", "backward", "optimiser", REST} <= set(parts)
        for hook in hooks:
            hook.remove()
    assert ran == (["CNN"] * 3 if cnn == "trained" else [])
    assert "loaded" in vars(ours.task.teacher) or cnn == "trained"
    assert ours.growth() > 0 and ours.model.depth == 12


@pytest.mark.parametrize("baseline", [pytest.param(S3prlDistiller, marks=pytest.mark.s3prl), FairseqModules])
def test_a_peer_has_the_same_teacher_and_learns(inputs, baseline):
    training = baseline(inputs, "demo", BATCH, SECONDS, "cpu")
    waveforms = training.waveforms
    lengths = torch.full((BATCH,), waveforms.size(1))
    expected = load_teacher(inputs / TEACHER).hidden_states(waveforms, lengths, [4, 8, 12])
    with torch.no_grad():
        targets = training.targets()
    if baseline is S3prlDistiller:
        targets = targets.unbind(1)
    else:
        targets = [state.transpose(0, 1) for state in targets]
    for state, layer in zip(targets, (4, 8, 12)):
        frames = expected[layer].size(1)  # fairseq pads to an even number
        torch.testing.assert_close(state[:, :frames], expected[layer], rtol=1e-3, atol=1e-4)
    before = [parameter.clone() for parameter in training.parameters()]
    assert set(training.update(12)) == {"targets", "student", "backward", "optimiser", REST}
    changed = [not torch.equal(old, new) for old, new in zip(before, training.parameters())]
    assert sum(changed) > 0.9 * len(changed)


def test_workers_keep_their_own_state_and_pass_on_what_fails():
    with workers(1, {"a": (Counter, 1), "b": (Counter, 10)}) as (running, _):
        assert [running[name].call("update", 2) for name in ("a", "b", "a")] == [3, 12, 5]
        assert running["a"].run(peak_memory) > 2**20
        with pytest.raises(RuntimeError, match="TypeError"):
            running["b"].call("update", "x")
    with pytest.raises(RuntimeError, match="too small"):
        with workers(1, {"a": (Counter, -1)}):
            pass


def measured(makers, notes, one_by_one):
    """What measure_each finds, and what the trainings noted: (name, note)."""
    notes.touch()
    makers = {name: (kind, notes, name, fits) for name, (kind, fits) in makers.items()}
    found = measure_each(1, makers, {name: (3, 6, 12) for name in makers}, rounds=2, one_by_one=one_by_one)
    return found, [tuple(line.split(maxsplit=2)[1:]) for line in notes.read_text().splitlines()]


def test_trainings_that_do_not_fit_leave_cells_empty_and_the_others_take_turns(tmp_path):
    found, noted = measured({"none": (Hungry, 0), "half": (Hungry, 6), "all": (Hungry, 12)}, tmp_path / "notes", False)
    assert {name: figures["update"] for name, figures in found.items()} == {
        "none": {}, "half": {3: 3.0, 6: 6.0}, "all": {3: 3.0, 6: 6.0, 12: 12.0},
    }  # fmt: skip
    assert found["all"]["growth"] == 1.0 and found["all"]["peak_memory"] > 2**20
    assert not {"growth", "peak_memory"} & found["half"].keys()
    turns = [("half", "3"), ("all", "3"), ("half", "6"), ("all", "6"), ("half", "12"), ("all", "12")]
    later = [turn for turn in turns if turn != ("half", "12")]  # it is not asked again for what does not fit
    assert [note for note in noted if note[1].isdigit()] == turns + 2 * later


def test_one_by_one_each_has_the_memory_to_itself_and_a_killed_one_ends_nothing(tmp_path):
    found, noted = measured({"half": (Hungry, 6), "killed": (Doomed, 3), "all": (Hungry, 12)}, tmp_path / "notes", True)
    assert [note for note in noted if not note[1].isdigit()] == [
        ("half", "alone"),
        ("killed", "alone"),
        ("all", "alone"),
    ]
    assert list(found["half"]["update"]) == [3, 6] and list(found["all"]["update"]) == [3, 6, 12]
    assert found["killed"] == {"update": {}, "parts": {}}  # in the round that warms up


def test_an_update_that_runs_out_of_memory_has_no_time(inputs):
    """As on a GPU, where fairseq knows the error by its words, and on a CPU, where it does not."""
    case = Case("fp32", "live", "trained")
    ours = Ours(RECIPES, inputs, "demo", BATCH, "cpu", case)

    def fails(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = ours.model.encoder.layers[0].register_forward_hook(fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ours.update(3)
    hook.remove()
    assert {"data", "backward"} <= set(ours.update(3)) and ours.clock.parts == [REST]


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch", "0"], "--batch 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "0.01"], "--seconds 0.01 is shorter than a frame"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--precision"], "--precision without a precision leaves nothing to measure"),
        (["--target-format", "fp16", "pq"], "--target-format pq is unknown"),
        (["--output", str(ROOT)], "is a folder; give a file"),
        (["--output", f"{ROOT}/setup.py/figures.json"], "setup.py is a file and no folder"),
        pytest.param(
            ["--device", "cuda"],
            "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so cuda is no wrong device"),
        ),
    ],
)
def test_options_that_cannot_be_measured_are_refused_in_a_line(options, says):
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *options])
    assert str(ended.value.code).startswith("error: ") and says in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize(
    "chosen, named",
    [
        (["--precision", "--baseline", "fairseq"], {"fairseq"}),
        (
            ["--precision", "bf16", "--targets", "stored", "--cnn", "shared"],
            {"bf16, targets stored in fp16, CNN shared"},
        ),
    ],
)
def test_only_the_chosen_cases_are_measured(chosen, named, tmp_path, capsys):
    output = tmp_path / "figures.json"
    shape = ["--size", "demo", "--batch", "1", "--seconds", "0.5", "--rounds", "1", "--device", "cpu", "--threads", "1"]
    main(["benchmark", *shape, *chosen, "--output", str(output)])
    assert set(json.loads(output.read_text())["cases"]) == named
    assert all(name in capsys.readouterr().out for name in named)


def test_the_tables_hold_ratios():
    def figures(seconds):
        update = {str(depth): seconds * depth for depth in (3, 6, 9, 12)}
        parts = {depth: {"data": value} for depth, value in update.items()}
        return {"update": update, "parts": parts, "peak_memory": 2**30, "growth": 0.01}

    baseline = {"update": {"12": 48.0}, "parts": {"12": {"data": 48.0}}, "peak_memory": 2**31}
    cases = {"bf16, live targets, CNN trained": figures(2.0), "bf16, targets stored in pq64, CNN trained": figures(1.0)}
    result = {
        "cases": {**cases, "s3prl": baseline},
        "baselines": ["s3prl"],
        "did_not_fit": {name: [] for name in (*cases, "s3prl")},
    }
    text = re.sub(" +", " ", benchmark_tables(json.loads(json.dumps(result))))  # columns are padded
    assert "| bf16, live targets, CNN trained | 1.60x | 1.33x | 0.010 |" in text
    assert "| bf16, live targets, CNN trained | 2.00x | | 0.50x |" in text
    # 48 / (9 + 3 / 75)
    assert "| bf16, targets stored in pq64, CNN trained | 4.00x | 5.31x | 0.50x |" in text
    assert "fit" not in text

    # Without the first epoch's live targets, nobody knows the time of a whole recipe.
    stored = {**result, "cases": {name: case for name, case in result["cases"].items() if "live" not in name}}
    text = re.sub(" +", " ", benchmark_tables(json.loads(json.dumps(stored))))
    assert "| bf16, targets stored in pq64, CNN trained | 4.00x | | 0.50x |" in text

    live = result["cases"]["bf16, live targets, CNN trained"]
    for depth in ("9", "12"):
        del live["update"][depth], live["parts"][depth]
    del live["growth"], baseline["peak_memory"]
    baseline.update(update={}, parts={})
    result["did_not_fit"].update({"bf16, live targets, CNN trained": [9, 12], "s3prl": [12]})
    text = re.sub(" +", " ", benchmark_tables(json.loads(json.dumps(result))))  # columns are padded
    assert "| bf16, live targets, CNN trained | 12 | | | |" in text
    assert "| bf16, live targets, CNN trained | | | |" in text
    assert "| bf16, targets stored in pq64, CNN trained | 1.60x | 1.33x | 0.010 |" in text
    assert text.endswith("bf16, live targets, CNN trained: 9 and 12 layers did not fit into memory\n"
                         "s3prl: 12 layers did not fit into memory")  # fmt: skip
