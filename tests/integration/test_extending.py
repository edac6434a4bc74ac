"""The examples of docs/extending.md do what the page says, from a folder outside the package."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, stock_hubert
from fairseq import tasks
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training import EXAMPLES, ROOT, hydra_train, tiny, train
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel, Wav2Vec2FeatureExtractor

from fairseq_stack import extensions
from fairseq_stack.analysis.held_out import explained_by_layer, read_held_out
from fairseq_stack.analysis.objective import objective_of
from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.criterions.layer_mapping import predicted_layers
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.errors import InputError
from fairseq_stack.evaluation.tasks import TASKS, LabelledRecording, find_tasks
from fairseq_stack.export.formats import FORMATS
from fairseq_stack.export.student import export
from fairseq_stack.extensions import load_extensions, use_extensions
from fairseq_stack.growth.events import LISTENERS
from fairseq_stack.growth.plan import METHODS, plan_growth
from fairseq_stack.growth.schedule import SCHEDULES, stage_starts
from fairseq_stack.models.stacked_hubert import StackedHubert
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.families import FAMILIES, LAYOUTS
from fairseq_stack.training import growth_listeners  # noqa: F401  registers the package's own
from fairseq_stack.training.recipes import compose_recipe

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
REGISTRIES = (LOSSES, METHODS, SCHEDULES, LISTENERS, FAMILIES, LAYOUTS, FORMATS, TASKS)
OF_THE_PACKAGE = [list(registry) for registry in REGISTRIES]
FIELDS = {
    "+task.extensions": "[huber.py,top_layer.py,doubling.py,growth_ratios.py]",
    "+criterion.loss": "huber",
    "model.stack_method": "top_layer",
    "model.stack_schedule": "doubling",
    "model.stack_stages": 2,
    "optimization.max_update": 6,
    "checkpoint.save_interval_updates": 2,
    "checkpoint.keep_interval_updates": -1,
}


def write_examples(folder):
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        name, code = block.split("\n", 1)
        (folder / name.removeprefix("# ")).write_text(code)
    return folder


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The page's files in the current folder. What they register is not used afterwards."""
    monkeypatch.chdir(write_examples(tmp_path))
    monkeypatch.setattr(extensions, "_of_program", [])
    yield tmp_path
    extensions._of_program.clear()
    use_extensions([])
    assert [list(registry) for registry in REGISTRIES] == OF_THE_PACKAGE


@pytest.fixture(scope="module")
def run(speech, teacher_file, tmp_path_factory):
    """The folder of a training with a user's loss, growth method, schedule and listener, by the command."""
    folder = write_examples(tmp_path_factory.mktemp("run"))
    overrides = [*tiny(speech, teacher_file, folder, **FIELDS), f"common.user_dir={ROOT}/fairseq_stack"]
    process = hydra_train("librispeech_base", overrides, config_dir=EXAMPLES / "interleaved", cwd=folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return folder


def test_the_command_trains_with_a_users_loss_method_schedule_and_listener(run):
    (line,) = (run / "checkpoints/growth_ratios.tsv").read_text().splitlines()
    update, depth, ratio = line.split("\t")
    assert (int(update), int(depth)) == (2, 12) and float(ratio) > 0
    cfg = load_checkpoint(run / "checkpoints/checkpoint_last.pt")["cfg"]
    assert cfg["task"]["extensions"] == ["huber.py", "top_layer.py", "doubling.py", "growth_ratios.py"]


def test_the_same_training_in_this_process_ends_with_the_same_weights(run, examples, speech, teacher_file):
    model = train("librispeech_base", tiny(speech, teacher_file, examples, **FIELDS)).get_model()
    assert model.plan.depths == (6, 12) and model.starts == (0, 2)
    assert model.plan.growths == (tuple((5, seat) for seat in range(6, 12)),)
    for name, value in load_checkpoint(run / "checkpoints/checkpoint_last.pt")["model"].items():
        if name in dict(model.named_parameters()):
            assert torch.equal(value, model.state_dict()[name]), name
    # What was saved before the growth resumes, too.
    ratios = examples / "checkpoints/growth_ratios.tsv"
    before = ratios.read_text()
    fields = {**FIELDS, "checkpoint.restore_file": run / "checkpoints/checkpoint_1_2.pt"}
    train("librispeech_base", tiny(speech, teacher_file, examples, **fields))
    assert ratios.read_text() == 2 * before


def test_a_training_has_the_extensions_that_it_names_and_not_those_of_another(examples, speech, teacher_file):
    """In one process, as in a notebook or a sweep."""
    short = {"model.stack_stages": 2, "optimization.max_update": 2}

    def ratios(folder, fields):
        train("librispeech_base", tiny(speech, teacher_file, examples / folder, **short, **fields))
        path = examples / folder / "checkpoints/growth_ratios.tsv"
        return len(path.read_text().splitlines()) if path.exists() else 0

    named = {"+task.extensions": "[growth_ratios.py,huber.py]", "+criterion.loss": "huber"}
    assert ratios("first", named) == 1
    assert [list(registry) for registry in REGISTRIES] == OF_THE_PACKAGE
    assert ratios("second", {}) == 0
    assert ratios("third", named) == 1
    (examples / "other.py").write_text((examples / "huber.py").read_text())
    assert ratios("fourth", {"+task.extensions": "[other.py]", "+criterion.loss": "huber"}) == 0
    with pytest.raises(SystemExit, match="error: criterion.loss=huber"):
        ratios("fifth", {"+criterion.loss": "huber"})


def test_extensions_of_a_program_stay_and_those_that_share_a_module_both_have_it(examples, monkeypatch):
    monkeypatch.syspath_prepend(examples)
    (examples / "a.py").write_text("import huber\n")
    (examples / "b.py").write_text("from fairseq_stack.extensions import load_extensions\nload_extensions(['huber'])\n")
    for names, used in ((["a.py"], 1), ([], 0), (["b.py"], 1), ([], 0), (["huber"], 1), (None, 0)):
        use_extensions(names)
        assert ("huber" in LOSSES) == used, names
    load_extensions(["growth_ratios.py"])
    use_extensions(["growth_ratios.py"])
    use_extensions([])
    assert list(LISTENERS).count("growth ratios") == 1
    # What is imported, but not by an extension, is the program's.
    (examples / "mine.py").write_text((examples / "growth_ratios.py").read_text().replace("growth ratios", "mine"))
    importlib.import_module("mine")
    use_extensions(["mine"])
    use_extensions([])
    assert "mine" in LISTENERS
    del LISTENERS._found["mine"]


@pytest.mark.parametrize("file, depth", [("checkpoint_1_2.pt", 6), ("checkpoint_last.pt", 12)])
def test_a_student_is_used_without_the_extensions_that_trained_it(file, depth, run, speech, tmp_path):
    path = run / "checkpoints" / file
    assert "huber" not in LOSSES and "top_layer" not in METHODS
    state = load_checkpoint(path)
    assert student_from_checkpoint(state).depth == StackedHubert.from_checkpoint(state).depth == depth
    held_out = read_held_out(path, speech / "valid.tsv")
    assert explained_by_layer(*held_out, seconds=1).keys() == {4, 8, 12}
    assert held_out.student.at_initialisation().depth == depth
    assert objective_of(state["cfg"])["criterion.loss"] == "huber"
    export(path, "huggingface", tmp_path / "student")
    assert f"exported at {depth} of 12 layers" in (tmp_path / "student/README.md").read_text()
    assert "huber" not in LOSSES  # nothing that the checkpoint names has run


def test_a_students_seats_must_be_seats(run):
    state = load_checkpoint(run / "checkpoints/checkpoint_last.pt")
    for seats in ([0.0] * 12, [1.0] * 11, [2.0] * 12):
        state["model"]["stage_seats"] = torch.tensor(seats)
        with pytest.raises(InputError, match="stage_seats has"):
            student_from_checkpoint(state)


def test_a_users_format_is_verified_like_any_other(run, examples):
    checkpoint, output = run / "checkpoints/checkpoint_last.pt", examples / "by_command"
    main(["--extensions", "flat_file.py", "export", checkpoint, "--to", "flat-file", "--output", output])
    assert list(FORMATS) == ["huggingface", "s3prl", "s3prl-distiller", "fairseq", "onnx", "flat-file"]
    proof = export(checkpoint, "flat-file", examples / "student.safetensors")
    assert proof["format"] == "flat-file" and proof["largest_difference_padded"] < 1e-4
    student = student_from_checkpoint(load_checkpoint(checkpoint))
    assert load_file(output).keys() == load_file(examples / "student.safetensors").keys() == student.weights.keys()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_users_family_gives_what_transformers_gives(normalize, examples):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=8,
                 conv_dim=(8,) * 7, feat_extract_norm="layer", num_conv_pos_embeddings=8, conv_depthwise_kernel_size=3,
                 num_conv_pos_embedding_groups=4)  # fmt: skip
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**shape)).eval()
    model.save_pretrained(examples / "teacher")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(examples / "teacher")
    with pytest.raises(InputError, match="model_type=wav2vec2-conformer .* give one of hubert"):
        load_teacher(examples / "teacher")
    load_extensions(["conformer.py"])
    teacher = load_teacher(examples / "teacher")
    assert (teacher.depth, teacher.width, teacher.frames(4000)) == (2, 16, 12)
    waveforms, lengths = 0.1 * torch.randn(2, 4000), torch.tensor([4000, 3000])
    waveforms[1, 3000:] = 0
    found = teacher.hidden_states(waveforms, lengths, [0, 1, 2])
    for row, length in enumerate(lengths):
        inputs = extractor(waveforms[row, :length].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            expected = model(inputs, output_hidden_states=True).hidden_states
        for layer in range(3):
            state = found[layer][row, : teacher.frames(int(length))]
            torch.testing.assert_close(state, expected[layer][0], rtol=1e-4, atol=1e-5)


def test_a_users_layout_is_asked_first(examples):
    model, cfg = stock_hubert(**TINY)
    weights = {f"hubert.{name}": value for name, value in model.state_dict().items()}
    parameters = {"model": cfg["model"], "normalize": False}
    content = {"pytorch-lightning_version": "2", "state_dict": weights, "hyper_parameters": parameters, "model": {}}
    torch.save(content, "teacher.ckpt")
    torch.save({"cfg": cfg, "model": model.state_dict()}, "teacher.pt")
    with pytest.raises(InputError):
        load_teacher("teacher.ckpt")
    load_extensions(["lightning.py"])
    ours, theirs = load_teacher("teacher.ckpt"), load_teacher("teacher.pt")
    assert ours.family == theirs.family == "HuBERT"
    inputs = torch.randn(1, 4000), torch.tensor([4000]), [0, 12]
    for layer, state in ours.hidden_states(*inputs).items():
        assert torch.equal(state, theirs.hidden_states(*inputs)[layer])


def test_a_users_probe_task_joins_the_others(examples):
    labels = dict.fromkeys(("speaker", "language", "keyword", "text"), "")
    recordings = [
        LabelledRecording(f"{split}{number}", "", 1000 * number, split, labels)
        for split in ("train", "valid", "test")
        for number in range(4)
    ]
    load_extensions(["duration.py"])
    (task,), without = find_tasks(recordings)
    assert (task.name, task.classes) == ("duration", ("long", "short")) and task.chance == 0.5
    assert list(without) == ["speaker", "language", "keyword", "recognition", "phoneme", "verification"]


def test_a_recipe_is_composed_with_its_extensions(examples):
    cfg = compose_recipe(EXAMPLES / "interleaved", "demo", ["+task.extensions=[huber.py]", "+criterion.loss=huber"])
    assert predicted_layers(cfg.criterion, 12) == [4, 8, 12]


def test_an_installed_package_is_loaded_by_its_entry_point(examples):
    (examples / "parts-1.0.dist-info").mkdir()
    (examples / "parts-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: parts\nVersion: 1.0\n")
    points = examples / "parts-1.0.dist-info/entry_points.txt"
    points.write_text("[fairseq_stack.extensions]\nmine = missing_parts\n")
    lists_losses = """
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.errors import one_line_errors
one_line_errors(lambda: print(*LOSSES))()
"""

    def listed():
        path = {**os.environ, "PYTHONPATH": f"{examples}{os.pathsep}{ROOT}"}
        return subprocess.run([sys.executable, "-c", lists_losses], env=path, capture_output=True, text=True)

    failed = listed()
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: the installed extension mine (missing_parts) cannot be imported")
    points.write_text("[fairseq_stack.extensions]\nmine = huber\n")
    assert listed().stdout.split() == ["mse", "l1", "l1_cosine", "temporal_gram", "units", "codes", "huber"]


def test_a_task_set_up_from_a_checkpoint_runs_no_file_that_it_names(run, examples):
    state = load_checkpoint(run / "checkpoints/checkpoint_last.pt")
    tasks.setup_task(OmegaConf.create(state["cfg"]["task"]))
    assert "huber" not in LOSSES


def test_a_file_is_loaded_once_and_a_name_belongs_to_one(examples):
    load_extensions(["huber.py", str(examples / "huber.py"), "./huber.py"])
    (examples / "other.py").write_text((examples / "huber.py").read_text())
    with pytest.raises(InputError, match=r"other.py cannot be imported in line [67]: .*loss=huber is taken by"):
        load_extensions(["other.py"])


def test_a_file_that_has_failed_is_executed_again(examples):
    code = (examples / "huber.py").read_text()
    Path("bad.py").write_text(code.replace("def huber", "def first") + "\n1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        use_extensions(["bad.py"])
    assert "huber" not in LOSSES
    Path("bad.py").write_text(code)
    use_extensions(["bad.py"])
    assert LOSSES["huber"].function.__name__ == "huber"


@pytest.mark.parametrize(
    "code, given, message",
    [
        ("import no_such_module\n", "[bad.py]", "=bad.py cannot be imported in line 1: ModuleNotFoundError: "),
        ("\n1 / 0\n", "[bad.py]", "=bad.py cannot be imported in line 2: ZeroDivisionError: division"),
        ("def f(:\n", "[bad.py]", "=bad.py cannot be imported: SyntaxError: invalid syntax"),
        ("", "[missing.py]", "=missing.py is no file (in "),
        ("", "[no_such_module]", "=no_such_module cannot be imported: ModuleNotFoundError"),
        ("", "bad.py", "=bad.py must be a list of files and modules, such as [my_losses.py]"),
    ],
)
def test_a_file_that_cannot_be_loaded_ends_the_training_in_one_line(
    code, given, message, examples, speech, teacher_file
):
    Path("bad.py").write_text(code)
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, examples, **{"+task.extensions": given}))
    assert str(ended.value).startswith(f"error: task.extensions{message}") and "\n" not in str(ended.value)


def test_a_loss_of_codes_that_no_store_has_is_refused_in_one_line(examples, speech, teacher_file):
    Path("coded.py").write_text((examples / "huber.py").read_text().replace('("huber")', '("coded", codes="rvq")'))
    fields = {"+task.extensions": "[coded.py]", "+criterion.loss": "coded"}
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, examples, **fields))
    expected = "error: criterion.loss=coded was registered with codes='rvq'; give one of pq, units"
    assert str(ended.value) == expected


@pytest.mark.parametrize("grown", ["stack", "stack + [7]", "stack[::-1] * 2", "stack * 9"])
def test_a_growth_method_that_loses_layers_is_refused(grown, monkeypatch):
    monkeypatch.setattr(METHODS, "_found", dict(METHODS._found))
    METHODS.register("bad")(eval(f"lambda stack, block, layers: {grown}"))
    with pytest.raises(InputError, match="model.stack_method=bad makes .* a growth must keep them all in their order"):
        plan_growth("bad", 12, 4)


@pytest.mark.parametrize("starts", [[0], [1, 2, 3, 4], [0, 5, 4, 6], [0, 1, 2, 99]])
def test_a_schedule_that_gives_a_stage_no_update_is_refused(starts, monkeypatch):
    monkeypatch.setattr(SCHEDULES, "_found", dict(SCHEDULES._found))
    SCHEDULES.register("bad")(lambda *_: starts)
    with pytest.raises(InputError):
        stage_starts("bad", 4, 10)
