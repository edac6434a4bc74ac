"""Students are fine-tuned by fairseq's own CTC: with the commands of docs/finetuning.md, and with fairseq's recipe."""

import re
import subprocess
import sys
from pathlib import Path

import fairseq
import pytest
import torch
from conftest import TINY, stock_hubert
from training import ROOT, train

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.export.fairseq import export_fairseq

pytest.importorskip("editdistance", reason="fairseq's CTC loss needs pip install editdistance")

COMMANDS = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/finetuning.md").read_text(), re.MULTILINE | re.DOTALL)
DICTIONARY = next(text for text in COMMANDS if "dict.ltr.txt" in text)
TRAIN = next(text for text in COMMANDS if text.startswith("fairseq-hydra-train"))
SMALL = {
    "common.fp16": "false",
    "dataset.num_workers": 0,
    "dataset.max_tokens": 40_000,
    "dataset.validate_interval": 1,
    "checkpoint.save_interval": 1,
    "lr_scheduler.warmup_steps": 2,
    "optimization.lr": "[0.001]",
    "model.freeze_finetune_updates": 2,
    "model.mask_length": 2,  # recordings of 0.2 s
    "model.mask_channel_length": 4,
}


@pytest.fixture
def root(tmp_path, speech):
    """A folder as the guide has it: the repository, manifests, transcripts without a dictionary, and a student."""
    for name in ("examples", "fairseq_stack"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "manifests").symlink_to(speech)
    (tmp_path / "transcripts").mkdir()
    for split, count in (("train", 24), ("valid", 6)):
        (tmp_path / f"transcripts/{split}.ltr").write_text("A | M A N |\n" * count)
    model, cfg = stock_hubert(**TINY, extractor_mode="layer_norm")
    pretraining = ("mask_emb", "final_proj", "label_embs")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(pretraining)}
    cfg["model"].update(_name="stacked_hubert", stack_method="none", stack_stages=1)
    torch.save({"model": {**weights, "stage": torch.tensor(0.0)}, "cfg": cfg}, tmp_path / "checkpoint.pt")
    export_fairseq(student_from_checkpoint(load_checkpoint(tmp_path / "checkpoint.pt")), tmp_path / "student.pt")
    return tmp_path


def typed(command, folder):
    """Run a command as it is typed into a shell in `folder`; returns what it prints."""
    programs = Path(sys.executable).parent
    done = subprocess.run(["sh", "-c", f"PATH={programs}:$PATH\n{command}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def moved(folder, start):
    """Names of the weights that fine-tuning has changed."""
    tuned = load_checkpoint(folder / "outputs/ctc/checkpoints/checkpoint_last.pt")["model"]
    tuned = {name.removeprefix("w2v_encoder.w2v_model."): value for name, value in tuned.items()}
    return {name for name, value in start.items() if name in tuned and not torch.equal(value, tuned[name])}


def test_the_documented_commands_fine_tune_a_student_and_resume(root):
    typed(DICTIONARY, root)
    assert (root / "transcripts/dict.ltr.txt").read_text().split() == ["|", "48", "A", "48", "N", "24", "M", "24"]
    small = " ".join(f"{name}={value}" for name, value in SMALL.items())
    log = typed(f"{TRAIN.strip()} {small} optimization.max_update=4", root)
    assert "num_updates 4" in log and re.search(r"valid on 'valid' subset .* wer [\d.]+ .* num_updates 4", log)
    start = load_checkpoint(root / "student.pt")["model"]
    changed = moved(root, start)
    assert {"encoder.layers.0.fc1.weight", "encoder.layers.11.fc1.weight", "mask_emb"} <= changed
    assert not any(name.startswith("feature_extractor") for name in changed)  # frozen by the recipe

    log = typed(f"{TRAIN.strip()} {small} optimization.max_update=6", root)
    assert "(epoch 1 @ 4 updates)" in log and "num_updates 6" in log


def test_fairseqs_own_recipe_fine_tunes_a_student(root):
    typed(DICTIONARY, root)
    overrides = [f"{name}={value}" for name, value in SMALL.items()]
    overrides += ["+task.pad_audio=true", "+task.random_crop=false", "optimization.max_update=3",
                  f"task.data={root}/manifests", f"task.label_dir={root}/transcripts",
                  f"model.w2v_path={root}/student.pt", f"checkpoint.save_dir={root}/stock",
                  f"common.tensorboard_logdir={root}/tensorboard"]  # fmt: skip
    recipes = Path(fairseq.__file__).parent / "examples/hubert/config/finetune"
    trainer = train("base_10h", overrides, folder=recipes)
    assert trainer.get_num_updates() == 3 and (root / "stock/checkpoint_best.pt").exists()
