"""An experiment trains every student with every seed, and says how they compare."""

import json
import shutil

import numpy as np
import pytest
import torch
from training import EXAMPLES, ROOT, tiny

from fairseq_stack.cli import main
from fairseq_stack.errors import InputError
from fairseq_stack.experiment import comparison
from fairseq_stack.experiment.grid import read_grid
from fairseq_stack.experiment.measures import collect, time_to_reach
from fairseq_stack.experiment.summary import draw_curves, draw_loss_and_time, summary_table
from fairseq_stack.experiment.training import MEASURED, trainings
from fairseq_stack.training.recipes import compose_recipe
from fairseq_stack.training.stored_targets import store_targets

GRID = f"""
recipe: {EXAMPLES}/interleaved/librispeech_base.yaml
reference: full
seeds: [1, 2]
fields: [optimization.max_update=6, dataset.validate_interval_updates=3]
students:
  full: [model.stack_method=none, model.stack_stages=1]
  grown: []
"""


@pytest.fixture(scope="module")
def speech_with_test(speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    for split in ("train", "valid"):
        shutil.copy(speech / f"{split}.tsv", folder)
    shutil.copy(speech / "valid.tsv", folder / "test.tsv")
    return folder


@pytest.fixture
def grid_file(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    return file


@pytest.fixture
def start(grid_file, speech_with_test, teacher_file, tmp_path, capsys):
    """The command, to be started more than once; its trainings have processes of their own. Gives exit code and output."""
    changed = {
        "optimization.max_update",
        "task.data",
        "task.teacher",
        "checkpoint.save_dir",
        "common.tensorboard_logdir",
    }
    fields = [field for field in tiny("", "", "") if field.split("=")[0] not in changed]

    def started(*more):
        code, message = 0, ""
        try:
            main([
                "compare", grid_file, "--output", tmp_path / "out", "--speech", speech_with_test,
                "--teacher", teacher_file, "--processes", 2, *fields, *more,
            ])  # fmt: skip
        except SystemExit as ended:
            code, message = 1, ended.code
        printed, said = capsys.readouterr()
        return code, f"{said}\n{printed}\n{message}"

    threads = torch.get_num_threads()
    yield started
    torch.set_num_threads(threads)


def test_every_seed_is_trained_once_and_all_are_in_the_results(start, grid_file, tmp_path, monkeypatch):
    out, stored = tmp_path / "out", []

    def stores(*arguments):
        stored.append(arguments)
        store_targets(*arguments)

    monkeypatch.setattr(comparison, "store_targets", stores)
    alone = GRID.replace("  full: [model.stack_method=none, model.stack_stages=1]\n", "")
    grid_file.write_text(alone.replace("reference: full", "reference: grown"))
    code, output = start(f"+task.target_store={tmp_path}/store")
    assert code == 0, output
    assert len(stored) == 1 and "valid: 100%" in output  # both seeds use them
    results = json.loads((out / "results.json").read_text())
    seeds = results["students"]["grown"]["seeds"]
    assert list(seeds) == ["1", "2"] and seeds["1"]["loss"] != seeds["2"]["loss"]
    for measured in seeds.values():
        assert measured["updates"] == [3, 6] and measured["loss"][1] < measured["loss"][0]
        assert [depth for depth, _, _ in measured["stages"]] == [3, 6, 9, 12]
        assert set(measured["explained"]) == {"4", "8", "12"}
    assert results["environment"]["torch"] and results["command"].startswith(
        f"fairseq-stack compare {grid_file} --output "
    )
    for name in ("by_updates", "by_time", "loss_and_time"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert (out / "summary.md").read_text().strip() in output

    # One training is lost, the other stays as it is.
    logs = {log: log.read_text() for log in sorted(out.glob("runs/*/*/output.log"))}
    (out / "runs" / "grown" / "2" / MEASURED).unlink()
    shutil.rmtree(out / "runs" / "grown" / "2" / "checkpoints")
    code, output = start(f"+task.target_store={tmp_path}/store")
    assert code == 0, output
    assert len(stored) == 2 and "windows" not in output  # no bar where nothing is missing
    again = json.loads((out / "results.json").read_text())
    assert again["students"]["grown"]["seeds"]["2"]["loss"] == seeds["2"]["loss"]
    changed = [log.parent for log, text in logs.items() if log.read_text() != text]
    assert changed == [out / "runs" / "grown" / "2"]


def test_a_training_that_fails_is_named_and_what_the_others_lack_is_empty(start, grid_file, tmp_path):
    """The reference fails, and a student has no heads: nothing of the others is lost."""
    students = """
  full: [model.stack_method=nonsense]
  star: [model.stack_method=none, model.stack_stages=1, +criterion.loss=temporal_gram, 'criterion.teacher_layers=[4]']
"""
    grid_file.write_text(GRID.split("\n  full:")[0].replace("[1, 2]", "[1]") + students)
    code, output = start()
    assert code == 1 and "Traceback" not in output
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    reason = "criterion.loss=temporal_gram has no heads, so no variance is explained"
    assert notes == [f"note: star: {reason}; its cells stay empty"], output
    assert output.index(notes[0]) < output.index("trainings:")
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 2 trainings failed") and "model.stack_method=nonsense" in last
    lines = (tmp_path / "out/summary.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    (student, seeds, loss, *others) = table[2]
    assert len(table) == 3 and (student, seeds) == ("star", "1") and float(loss) > 0 and others == ["", "", ""]
    measured = json.loads((tmp_path / "out" / "runs" / "star" / "1" / MEASURED).read_text())
    assert measured["explained"] == {} and measured["loss_of"]["criterion.loss"] == "temporal_gram"


def test_a_folder_of_other_fields_is_not_gone_on_with(grid_file, tmp_path):
    grid = read_grid(grid_file)
    training = trainings(grid, tmp_path, ["task.data=a"])[0]
    training.folder.mkdir(parents=True)
    training.write_fields(grid.recipe)
    trainings(grid, tmp_path, ["task.data=a"])
    with pytest.raises(InputError, match="runs/full/1 was made with other fields"):
        trainings(grid, tmp_path, ["task.data=b"])


def test_the_time_to_reach_a_loss_lies_between_two_validations():
    measured = {"seconds": [10.0, 20.0, 40.0], "loss": [3.0, 2.0, 1.0]}
    assert time_to_reach(measured, 3.5) == 10.0
    assert time_to_reach(measured, 1.25) == pytest.approx(35.0)
    assert time_to_reach(measured, 0.9) is None


def written(grid, folder, student, seed, loss, costs, stages, **changed):
    training = next(made for made in trainings(grid, folder) if (made.student, made.seed) == (student, seed))
    training.folder.mkdir(parents=True)
    measured = {
        "updates": [3, 6], "loss": loss, "stages": stages, "seconds_per_update": costs, "explained": {"12": 0.5},
        "probes": {}, **changed,
    }  # fmt: skip
    (training.folder / MEASURED).write_text(json.dumps(measured))


def test_the_table_compares_seed_by_seed_and_takes_the_median_cost_of_a_depth(grid_file, tmp_path):
    grid = read_grid(grid_file)
    # At depth 12 an update took 1, 1 and 7 s: the last one met other work on the machine.
    written(grid, tmp_path, "full", 1, [4.0, 2.0], [1.0], [[12, 0, 6]])
    written(grid, tmp_path, "full", 2, [6.0, 4.0], [7.0], [[12, 0, 6]])
    written(grid, tmp_path, "grown", 1, [5.0, 1.0], [0.25, 1.0], [[3, 0, 4], [12, 4, 6]])
    results = collect(grid, trainings(grid, tmp_path), "command")
    assert results["students"]["full"]["seeds"]["2"]["seconds"] == [3.0, 6.0]
    assert results["students"]["grown"]["seeds"]["1"]["seconds"] == [0.75, 3.0]
    header, _, full, grown = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in summary_table(results).splitlines()
    ]
    # With seed 1, full ends at 2, which the other passes at 3/4 of the way from 5 to 1, after 0.75 + 1.6875 of 6 s.
    assert grown == ["grown", "1", "1.0000", "-50.0", "50.0", "2.00x", "41 (1 of 1 seeds)"]
    assert full[:2] == ["full", "2"] and full[2].startswith("3.0000 ± 12.7") and full[3] == "" and full[5] == "1.00x"
    assert len(header) == len(full)


def test_probes_have_intervals_over_test_recordings_and_differences_are_paired(grid_file, tmp_path):
    grid = read_grid(grid_file)
    spread = np.linspace(-0.08, 0.08, 1001)  # of the same recordings for all

    def probed(student, seed, score):
        resampled = (score + spread).tolist() if seed == 1 else [score] * 1001
        found = {"probes": {"speaker": score}, "resampled": {"speaker": resampled}}
        written(grid, tmp_path, student, seed, [4.0, 2.0], [1.0], [[12, 0, 6]], **found)

    probed("full", 1, 0.5)
    probed("full", 2, 0.7)
    probed("grown", 1, 0.6)
    results = collect(grid, trainings(grid, tmp_path), "command")
    assert "resampled" not in results["students"]["full"]["seeds"]["1"]
    title, table = summary_table(results).split("\n\n")[1:]
    assert title == "Probes, with 95 % intervals over test recordings instead of seeds:"
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header == ["student", "speaker, %", "speaker against full, points"]
    assert rows == [
        ["full", "60.0 [56.2, 63.8]", ""],  # the mean over the seeds, of which the second does not vary
        ["grown", "60.0 [52.4, 67.6]", "+10.0 [+10.0, +10.0]"],  # of seed 1: the recordings move both scores alike
    ]


def test_other_losses_are_told_apart_and_what_a_student_does_not_have_is_empty(grid_file, tmp_path):
    grid_file.write_text(GRID + "  other: []\n  bare: []\n")
    grid = read_grid(grid_file)
    of = {"criterion.loss": "mse", "task.teacher": "t"}
    full = [[12, 0, 6]]
    written(grid, tmp_path, "full", 1, [4.0, 2.0], [1.0], full, loss_of=of)
    written(grid, tmp_path, "grown", 1, [4.0, 1.0], [1.0], full, loss_of=of, explained={"4": 0.25, "12": 0.75})
    written(grid, tmp_path, "other", 1, [4.0, 1.0], [1.0], full, loss_of={**of, "criterion.loss": "l1"}, explained={})
    written(grid, tmp_path, "bare", 1, [], [float("nan")], [[12, 0, 6]], updates=[], explained={}, loss_of=None)
    results = collect(grid, trainings(grid, tmp_path), "command")
    table, note = summary_table(results).split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][4:6] == ["variance explained, layer 4, %", "variance explained, layer 12, %"]
    # Time is pooled over students of which a layer costs the same.
    assert rows[2:] == [
        ["full", "1", "2.0000 (A)", "", "", "50.0", "1.00x", "100 (1 of 1 seeds)"],
        ["grown", "1", "1.0000 (A)", "-50.0", "25.0", "75.0", "1.00x", "83 (1 of 1 seeds)"],
        ["other", "1", "1.0000 (B)", "", "", "", "1.00x", ""],
        ["bare", "1", "", "", "", "", "1.00x", ""],
    ]
    assert note == (
        "The students have 2 different output losses, which cannot be compared with each other: A is full, grown (criterion.loss=mse);"
        " B is other (criterion.loss=l1)."
    )
    for figure in (draw_curves(results, "minutes"), draw_loss_and_time(results)):
        legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
        assert legends == [["full", "grown"], ["other"]]


def test_seeds_that_ended_before_full_depth_are_named_and_drawn(grid_file, tmp_path):
    grid = read_grid(grid_file)
    written(grid, tmp_path, "full", 1, [4.0, 2.0], [1.0], [[12, 0, 6]], depth=12, full_depth=12)
    written(grid, tmp_path, "grown", 1, [4.0, 1.0], [0.5, 1.0], [[3, 0, 4], [12, 4, 6]], depth=12, full_depth=12)
    written(grid, tmp_path, "grown", 2, [4.0], [0.5], [[3, 0, 3]], updates=[3], depth=3, full_depth=12)
    results = collect(grid, trainings(grid, tmp_path), "command")
    assert summary_table(results).split("\n\n")[1] == "Ended before full depth: grown with seed 2 (3 of 12 layers)."
    (axis,) = draw_curves(results, "updates").axes
    assert [len(line.get_xdata()) for line in axis.get_lines()] == [2, 1]
    assert draw_loss_and_time(results).axes


def test_the_time_to_the_final_loss_of_the_reference_has_an_interval_over_the_seeds(grid_file, tmp_path):
    grid_file.write_text(GRID.replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    grid, whole = read_grid(grid_file), [[12, 0, 6]]
    for seed, end in ((1, 2.0), (2, 3.0), (3, 1.0)):
        written(grid, tmp_path, "full", seed, [9.0, end], [1.0], whole)
    # From 4 to 0 between 3 s and 6 s, so the goals 2, 3 and 1 are reached after 4.5, 3.75 and 5.25 of 6 s.
    for seed in (1, 2, 3):
        written(grid, tmp_path, "grown", seed, [4.0, 0.0], [1.0], whole)
    results = collect(grid, trainings(grid, tmp_path), "command")
    grown = [cell.strip() for cell in summary_table(results).splitlines()[3].split("|")[1:-1]]
    # 75 +- t(0.975, 2) * 12.5 / sqrt(3)
    assert grown[-1] == "75 ± 31 (3 of 3 seeds)"


def test_students_that_cost_something_else_are_timed_apart(grid_file):
    students = {
        "full": "[model.dropout=0.1]",
        "grown": "[+criterion.loss=l1, model.stack_stages=2, optimizer.weight_decay=0.1]",
        "narrow": "[model.encoder_embed_dim=8]",
        "muon": "[optimizer._name=muon]",
    }
    lines = "".join(f"  {name}: {fields}\n" for name, fields in students.items())
    grid_file.write_text(GRID.split("students:")[0] + f"students:\n{lines}")
    grid = read_grid(grid_file)
    assert grid.cost_group("grown") == ()
    assert len({grid.cost_group(student) for student in students}) == 4


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("reference: full", "reference: other", "reference=other"),
        ("seeds: [1, 2]", "seeds: [a]", r"seeds=\['a'\]"),
        ("seeds: [1, 2]", "", "must have the fields"),
        ("grown: []", "../grown: []", r"students.../grown"),
        ("grown: []", "grown: [stack_stages]", "students.grown"),
        ("librispeech_base.yaml", "no.yaml", "does not exist"),
        ("students:", "students: [", "cannot be read as YAML"),
    ],
)
def test_a_grid_that_cannot_be_says_which_field(grid_file, old, new, says):
    grid_file.write_text(GRID.replace(old, new))
    with pytest.raises(InputError, match=says) as raised:
        read_grid(grid_file)
    assert "\n" not in str(raised.value) and str(grid_file) in str(raised.value)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_that_come_along_can_be_composed(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # which the paths of growth operators start from
    grid = read_grid(path)
    for fields in {*grid.students.values()}:
        given = [*grid.fields, *fields, "task.data=x", "task.teacher=y"]
        assert compose_recipe(grid.recipe.parent, grid.recipe.stem, given).model._name == "stacked_hubert"
