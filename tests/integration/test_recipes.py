"""Every recipe in examples/ trains as it is written, with nothing but its sizes made small."""

import json
import re

import pytest
import torch
from conftest import TINY, stock_hubert
from training import EXAMPLES, composed, tiny, train
from transformers import WavLMConfig, WavLMModel

from fairseq_stack.analysis.held_out import read_held_out
from fairseq_stack.cli import main

RECIPES = sorted(
    path.relative_to(EXAMPLES).with_suffix("")
    for path in EXAMPLES.glob("*/*.yaml")
    if path.parent.name not in ("demo_teacher", "experiments", "finetuning")
)
GROWN = {"librispeech_base", "librispeech_base_equal", "librispeech_base_fast", "librispeech_base_star",
         "librispeech_base_units", "hubert_large", "wavlm_base", "demo", "demo_fast",
         "gradstack_equal", "gradstack_prop", "midas_equal", "midas_prop"}  # fmt: skip
UNITS = {"dicehubert", "librispeech_base_units"}


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory):
    """A random HuBERT with the structure of HuBERT Large: 24 pre-norm layers on normalised waveforms."""
    shape = {"encoder_layers": 24, "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
    model, cfg = stock_hubert(normalize=True, **{**TINY, **shape})
    path = tmp_path_factory.mktemp("large") / "teacher.pt"
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def wavlm_teacher(tmp_path_factory):
    """A random WavLM with the structure of WavLM Base, in transformers' format."""
    folder = tmp_path_factory.mktemp("wavlm")
    shape = WavLMConfig(hidden_size=16, num_hidden_layers=12, num_attention_heads=4, intermediate_size=32,
                        conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)  # fmt: skip
    WavLMModel(shape).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "sampling_rate": 16_000}))
    return folder


@pytest.fixture(scope="module")
def trained(speech, teacher_file, large_teacher, wavlm_teacher, tmp_path_factory):
    """A function that trains a recipe once; it returns fairseq's trainer and the run's folder."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(recipe):
        if recipe not in done:
            folder = root / recipe.name
            teacher = {"hubert_large": large_teacher, "wavlm_base": wavlm_teacher}.get(recipe.name, teacher_file)
            overrides = tiny(speech, teacher, folder)
            if recipe.name in ("demo", "demo_fast"):  # they batch by length
                overrides = [item for item in overrides if not item.startswith(("dataset.batch_size", "common.fp16"))]
            if recipe.name in UNITS:  # so little speech has fewer units
                overrides += [f"task.target_store={folder}/targets", "task.target_format=units20"]
            if recipe.name == "distilhubert":
                overrides.append("model.head_inner_dim=16")
            done[recipe] = train(recipe.name, overrides, folder=recipe.parent.name), folder
        return done[recipe]

    return run


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_recipe_trains_to_its_full_depth(recipe, trained):
    trainer, folder = trained(recipe)
    student = trainer.get_model()
    assert trainer.get_num_updates() == 20
    assert student.stage_number == len(student.plan.stages) == (4 if recipe.name in GROWN else 1)
    assert student.depth == (2 if recipe.name == "distilhubert" else 12)
    saved = torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=True)
    assert saved["model"]["stage"] == student.stage_number - 1
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.fixture
def command(capsys):
    """A function that runs fairseq-stack in this process; it returns the exit code and the lines of its output."""

    def run(*arguments):
        try:
            main(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_its_student_tells_the_held_out_variance_or_why_not(recipe, trained, command, speech):
    trainer, folder = trained(recipe)
    checkpoint = folder / "checkpoints/checkpoint_last.pt"
    code, lines = command("held-out", checkpoint, "--speech", speech / "valid.tsv", "--seconds", 1)
    if recipe.name in ("star", "librispeech_base_star"):
        assert "criterion.loss=temporal_gram, which has no heads" in code and "\n" not in code and not lines
        return
    if recipe.name in UNITS:
        assert "criterion.loss=units: it predicts codes and no hidden states" in code and "\n" not in code and not lines
        return
    assert code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert [int(layer) for layer, _, _ in rows] == trainer.criterion.layers
    assert all(float(share) < 1 for _, *shares in rows for share in shares)


def test_the_heads_of_a_student_without_an_output_loss_sit_where_they_were_trained(trained):
    """Only the teacher tells how deep it is."""
    trainer, folder = trained(next(recipe for recipe in RECIPES if recipe.name == "masked"))
    held_out = read_held_out(folder / "checkpoints/checkpoint_last.pt", trainer.cfg.task.data + "/valid.tsv")
    waveform = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000])
    with torch.no_grad():
        ours = held_out.student(*waveform)["predictions"]
        theirs = trainer.get_model().eval()(*waveform)["predictions"]
    assert list(ours) == list(theirs) == list(range(1, 13))
    for layer, prediction in theirs.items():
        torch.testing.assert_close(ours[layer], prediction)


def test_the_report_on_recipes_keeps_their_losses_apart(trained, command, tmp_path):
    names = ("demo", "full_l2l", "distilhubert", "masked", "star", "wavlm_base", "dicehubert")
    folders = [trained(next(recipe for recipe in RECIPES if recipe.name == name))[1] for name in names]
    code, lines = command("report", *folders, "--reference", folders[1], "--output", tmp_path)
    assert code == 0 and lines[-1] == f"report: {tmp_path}/index.html"
    (sentence,) = [line for line in lines if line.startswith("These runs have")]
    letters = dict(re.findall(r"(?:: |; )([A-Z]) is ([\w, ]+) \(", sentence))
    assert list(letters.values()) == list(names), sentence


def test_librispeech_base_is_the_published_recipe():
    """The numbers of the published recipe, by hand."""
    cfg = composed("librispeech_base", ["task.data=x", "task.teacher=y"])
    model, optimization = cfg.model, cfg.optimization
    assert (model.encoder_layers, model.encoder_embed_dim, model.encoder_ffn_embed_dim) == (12, 384, 1536)
    assert (model.encoder_attention_heads, model.stack_method, model.stack_stages) == (8, "interleaved", 4)
    assert (model.stack_schedule, model.stack_alpha) == ("prop", 1.0)
    assert optimization.lr == [5e-4] and cfg.optimizer.weight_decay == 1e-4 and cfg.dataset.batch_size == 64
    assert optimization.max_update == 75 * -(-281_241 // 64)  # 75 epochs of LibriSpeech 960 h
    assert cfg.lr_scheduler.warmup_updates == round(0.07 * optimization.max_update)
    assert cfg.criterion.intermediate_weight == 0.5 and cfg.criterion.teacher_layers == [4, 8, 12]
