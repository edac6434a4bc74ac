"""Students are fine-tuned by fairseq and by transformers with the commands of docs/finetuning.md, and exported."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import fairseq
import onnxruntime
import pytest
import soundfile
import torch
from conftest import S3PRL_FITS, TINY, stock_hubert
from documented import blocks, commands_of, run_command
from fairseq import optim, tasks
from fairseq.optim.lr_scheduler.tri_stage_lr_scheduler import TriStageLRSchedule
from training import ROOT, configuration, train
from transformers import HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.cli import main
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.prepare import LABELS
from fairseq_stack.export.fairseq import export_fairseq
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.export.verify import TOLERANCE
from fairseq_stack.models.exact_padding import ignore_padding

pytest.importorskip("editdistance", reason="fairseq's CTC loss needs pip install editdistance")

PAGE = "docs/finetuning.md"
COMMANDS = commands_of(PAGE)
TRAIN, SHORT = (line for line in COMMANDS if line.startswith("fairseq-hydra-train"))
(LETTERS,) = (line for line in COMMANDS if "letters.py" in line)
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


FEW_STEPS = "--max_steps 2 --per_device_train_batch_size 4 --report_to none --save_strategy no".split()


@pytest.fixture
def root(tmp_path, speech, monkeypatch):
    """A folder as the guide has it, to be in: the repository, labelled speech, and a student in two formats."""
    for name in ("examples", "fairseq_stack"):
        (tmp_path / name).symlink_to(ROOT / name)
    labelled_speech(tmp_path / "manifests", speech)
    model, cfg = stock_hubert(**TINY, extractor_mode="layer_norm")
    pretraining = ("mask_emb", "final_proj", "label_embs")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(pretraining)}
    cfg["model"].update(_name="stacked_hubert", stack_method="none", stack_stages=1)
    torch.save({"model": {**weights, "stage": torch.tensor(0.0)}, "cfg": cfg}, tmp_path / "checkpoint.pt")
    student = student_from_checkpoint(load_checkpoint(tmp_path / "checkpoint.pt"))
    export_fairseq(student, tmp_path / "student.pt")
    export_huggingface(student, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelled_speech(folder, speech):
    """Write the manifests of `speech` to a folder as fairseq-stack prepare does, with labels and a test.tsv."""
    folder.mkdir()
    rows = ["\t".join(LABELS)]
    for split in ("train", "valid", "test"):
        lines = (speech / f"{split.replace('test', 'valid')}.tsv").read_text().splitlines()
        if split == "test":
            lines = [str(speech / "audio"), *(line.removeprefix("audio/") for line in lines[1:])]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines[1:]):
            utterance = line.split("\t")[0].removesuffix(".flac")
            rows.append(f"{utterance}\tspeaker{number % 2}\ten\tA man.\t{'ab'[number % 2]}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n")


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


def test_the_documented_commands_fine_tune_a_student_with_fairseq_and_resume(root, capsys):
    run_command(LETTERS)
    assert (root / "letters/dict.ltr.txt").read_text().split() == ["a", "48", "|", "48", "m", "24", "n", "24"]
    assert (root / "letters/train.ltr").read_text() == "a | m a n |\n" * 24
    small = " ".join(f"{name}={value}" for name, value in SMALL.items())
    log = typed(f"{TRAIN} {small} optimization.max_update=4", root)
    assert "num_updates 4" in log and re.search(r"valid on 'valid' subset .* wer [\d.]+ .* num_updates 4", log)
    start = load_checkpoint(root / "student.pt")["model"]
    changed = moved(root, start)
    assert {"encoder.layers.0.fc1.weight", "encoder.layers.11.fc1.weight", "mask_emb"} <= changed
    assert not any(name.startswith("feature_extractor") for name in changed)  # frozen by the recipe

    log = typed(f"{TRAIN} {small} optimization.max_update=6", root)
    assert "(epoch 1 @ 4 updates)" in log and "num_updates 6" in log

    quick = [f"{name}={value}" for name, value in SMALL.items() if name.startswith("dataset")]
    run_command(f"{SHORT} {' '.join(quick)} optimization.max_update=4 model.freeze_finetune_updates=3")
    weights = load_checkpoint(root / "outputs/ctc_short/checkpoints/checkpoint_last.pt")["model"]
    assert not torch.equal(
        weights["w2v_encoder.w2v_model.encoder.layers.0.fc1.weight"], start["encoder.layers.0.fc1.weight"]
    )

    capsys.readouterr()
    run_command(next(line for line in COMMANDS if line.startswith("fairseq-validate")))
    assert re.search(r"uer [\d.]+ .* wer [\d.]+", capsys.readouterr().out)
    run_command(next(line for line in COMMANDS if "outputs/ctc/" in line and "--to onnx" in line))
    proof = json.loads((root / "ctc_fairseq.onnx.verification.json").read_text())
    assert proof["compared_with"] == "fairseq's hubert_ctc" and 0 < proof["largest_difference_alone"] <= TOLERANCE
    (root / "student.pt").rename(root / "moved.pt")
    with pytest.raises(SystemExit, match=f"model.w2v_path=student.pt, and there is no {root}/student.pt; put the file"):
        main(["export", "outputs/ctc/checkpoints/checkpoint_last.pt", "--to", "onnx", "--output", "x.onnx"])
    assert labels_of("ctc_fairseq.onnx") == ["", "<pad>", "</s>", "<unk>", "a", "|", "m", "n"]


def test_the_short_recipe_has_its_small_rate_when_the_students_layers_begin_to_train():
    places = ["task.data=letters", "task.label_dir=letters", "model.w2v_path=student.pt"]
    cfg = configuration("ctc_short", places, folder="finetuning")
    optimizer = optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    schedule = TriStageLRSchedule(cfg.lr_scheduler, optimizer)
    rates = [schedule.step_update(update) for update in range(cfg.optimization.max_update)]
    later = rates[cfg.model.freeze_finetune_updates :]
    assert max(rates) == 0.01 and len(later) == 400 and later == [pytest.approx(0.001)] * 400


def test_fairseq_reads_the_transcripts_of_any_script(root):
    texts = ["Да, это так.", "Ça va être très long.", "A man.", "人が 話す。", "Ёлка!"]
    table = root / "manifests/labels.tsv"
    header, *rows = (line.split("\t") for line in table.read_text().splitlines())
    rows = [[*row[:3], texts[number % len(texts)], row[4]] for number, row in enumerate(rows)]
    table.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n")
    run_command(LETTERS)
    places = [f"task.data={root}/letters", f"task.label_dir={root}/letters", "model.w2v_path=student.pt"]
    cfg = configuration("ctc", places, folder="finetuning")
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    read = [task.target_dictionary.string(task.dataset("train")[index]["label_list"][0]) for index in range(24)]
    assert read == (root / "letters/train.ltr").read_text().splitlines()
    assert read[:2] == ["д а | э т о | т а к |", "ç a | v a | ê t r e | t r è s | l o n g |"]


def labels_of(file):
    """What the outputs of an ONNX file stand for."""
    return json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map["labels"])


def test_the_documented_commands_fine_tune_a_student_with_transformers_and_export_it(root, capsys):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs pip install accelerate")
    others = [
        line for line in COMMANDS if "transformers_" in line or "outputs/ctc_hf" in line or "outputs/keyword" in line
    ]
    assert len(others) == 5 and {*others} | {line for line in COMMANDS if "letters" in line} == {*COMMANDS}
    for line in others:
        run_command(line, transformers_ctc=FEW_STEPS, transformers_classification=FEW_STEPS)
    for folder, errors in (("ctc_hf", {"cer", "wer"}), ("ctc_short_hf", {"cer", "wer"}), ("keyword", {"accuracy"})):
        results = json.loads((root / "outputs" / folder / "results.json").read_text())
        assert results.keys() == {"valid", "test"}
        assert {f"test_{name}" for name in errors} <= results["test"].keys()
    for file, labels in (("ctc.onnx", ["", "⁇", "|", "a", "m", "n"]), ("keyword.onnx", ["a", "b"])):
        assert labels_of(file) == labels
        assert json.loads((root / f"{file}.verification.json").read_text())["compared_with"].startswith("transformers'")

    with pytest.raises(SystemExit, match="--output_dir outputs/ctc_hf has a run with .*; give another folder"):
        run_command(others[0], transformers_ctc=["--random_weights", "true"])
    if S3PRL_FITS:
        main(["cost", "ctc.onnx", "--seconds", "1", "--runs", "1"])
        assert "| ctc.onnx |" in capsys.readouterr().out

    for options, words in (
        ("--to huggingface", "is fine-tuned, and --to huggingface has no place for its output layers; use --to onnx"),
        ("--to onnx", "is fine-tuned and names no speech; give --speech"),
        ("--to onnx --speech none.tsv", "none.tsv does not exist; give --speech"),
        ("--to onnx --hidden-states last", "--hidden-states last: outputs/ctc_hf is fine-tuned and has only logits"),
        ("--to onnx --ema", "--ema: outputs/ctc_hf is fine-tuned; leave the option out"),
    ):
        with pytest.raises(SystemExit, match=re.escape(words)):
            run_command(f"fairseq-stack export outputs/ctc_hf {options} --output x")

    # The example without torch reads what transformers reads.
    manifest = read_manifest(root / "manifests/test.tsv")
    wave, rate = soundfile.read(manifest.path(0))
    soundfile.write(root / "recording.wav", wave, rate)
    capsys.readouterr()
    exec(blocks(PAGE, "python")[-1], {})
    found = capsys.readouterr().out.rstrip("\n")
    model, tokenizer = (
        HubertForCTC.from_pretrained("outputs/ctc_hf"),
        Wav2Vec2CTCTokenizer.from_pretrained("outputs/ctc_hf"),
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(wave).float()[None]).logits
    assert found.replace("⁇", "").strip() == tokenizer.batch_decode(logits.argmax(-1))[0].replace("⁇", "").strip()


def test_labels_of_ones_own_and_letters_that_train_lacks_are_scored(root, capsys):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs pip install accelerate")
    table = root / "manifests/labels.tsv"
    header, *lines = table.read_text().splitlines()
    rows = [f"{header}\tmood", *(f"{line}\t{'calm' if number % 2 else 'glad'}" for number, line in enumerate(lines))]
    rows = [re.sub("^(audio/valid.*)A man", r"\1A жук", row) for row in rows]  # valid, and not test
    table.write_text("\n".join([*rows[:-1], rows[-1].replace("glad", "new").replace("calm", "new"), ""]))
    CTC, CLASSES, _ = (line for line in COMMANDS if "transformers_" in line)
    run_command(CLASSES.replace("keyword", "mood"), transformers_classification=FEW_STEPS)
    assert "test: left out 1 utterances whose mood train lacks" in capsys.readouterr().out
    # A batch of utterances that differ in length has the transcripts that each has alone.
    found = {}
    for size in ("1", "8"):
        options = [*FEW_STEPS, "--max_steps", "1", "--learning_rate", "0", "--per_device_eval_batch_size", size]
        run_command(f"{CTC} --output_dir outputs/by{size}", transformers_ctc=options)
        found[size] = json.loads((root / f"outputs/by{size}/results.json").read_text())
        found[size] = {name: found[size][name.split("_")[0]][name] for name in ("valid_cer", "test_cer", "test_wer")}
    assert found["1"] == found["8"]
    tokenizer = runpy.run_path(str(ROOT / "examples/finetuning/transformers_ctc.py"))["letter_tokenizer"](["a"], root)
    assert tokenizer.decode(tokenizer("a жук").input_ids, group_tokens=False) == "a ⁇⁇⁇"
    for words, change in (
        ("gives 1 classes", lambda text: re.sub("calm|glad", "same", text)),
        ("gives 2 classes, 24 utterances of train that are longer than 0 frames and 0 of valid",
         lambda text: re.sub("(?m)^(audio/valid.*)(calm|glad)", r"\1other", text)),
    ):  # fmt: skip
        text = table.read_text()
        table.write_text(change(text))
        with pytest.raises(SystemExit, match=re.escape(words)):
            run_command(CLASSES.replace("keyword", "mood"), transformers_classification=FEW_STEPS)
        table.write_text(text)
    with pytest.raises(SystemExit, match="--label=tone is unknown; choose from speaker, language, text, keyword, mood"):
        run_command(CLASSES.replace("keyword", "tone"))
    table.write_text(table.read_text().replace("A man.", "A man who never ends speaking."))
    with pytest.raises(SystemExit, match="train.tsv has no recording that is longer"):
        run_command(f"{CTC} --output_dir outputs/long", transformers_ctc=FEW_STEPS)


def test_the_output_layer_trains_alone_at_first_and_at_its_own_rate(root):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs pip install accelerate")
    command = next(line for line in COMMANDS if "transformers_ctc" in line)
    constant = [*FEW_STEPS, "--warmup_steps", "0", "--lr_scheduler_type", "constant"]

    def weights_after_two_steps(*options):
        output = f"outputs/{'_'.join(options)}"
        run_command(f"{command} --output_dir {output}", transformers_ctc=[*constant, *options])
        weights = HubertForCTC.from_pretrained(output).state_dict()
        return weights.pop("lm_head.bias"), weights.pop("lm_head.weight"), weights

    start, _, student = weights_after_two_steps("--learning_rate", "0")
    for options, rate, student_changes in (
        (["--learning_rate", "1e-3", "--frozen_steps", "2"], 1e-3, False),
        (["--learning_rate", "1e-3", "--frozen_steps", "1"], 1e-3, True),
        (["--learning_rate", "1e-3", "--output_learning_rate", "1e-2"], 1e-2, True),
        (["--learning_rate", "1e-3", "--output_learning_rate", "0"], 0, True),
    ):
        bias, _, weights = weights_after_two_steps(*options)
        # Adam's first steps are as long as the learning rate.
        assert (bias - start).abs().max().item() == pytest.approx(2 * rate, rel=0.1)
        assert any(not torch.equal(weights[name], value) for name, value in student.items()) == student_changes


@pytest.mark.parametrize("normalize", [False, True])
def test_padding_changes_nothing_in_a_group_norm_that_ignores_it(tmp_path, normalize):
    model, cfg = stock_hubert(normalize=normalize, **TINY)
    pretraining = ("mask_emb", "final_proj", "label_embs")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(pretraining)}
    cfg["model"].update(_name="stacked_hubert", stack_method="none", stack_stages=1)
    export_huggingface(
        student_from_checkpoint({"model": {**weights, "stage": torch.tensor(0.0)}, "cfg": cfg}), tmp_path
    )
    preprocess = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    torch.manual_seed(0)
    waveforms = [0.1 * torch.randn(length).numpy() for length in (4000, 16000, 9000)]
    ours, stock = HubertForCTC.from_pretrained(tmp_path).eval(), HubertForCTC.from_pretrained(tmp_path).eval()
    ours.load_state_dict(stock.state_dict())
    ignore_padding(ours)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    batch = preprocess(waveforms, padding=True, sampling_rate=16_000, return_tensors="pt")
    differences = {}
    with torch.no_grad():
        for name, padded in (("ours", ours(**batch).logits), ("stock", stock(**batch).logits)):
            alone = [stock(**preprocess(one, sampling_rate=16_000, return_tensors="pt")).logits[0] for one in waveforms]
            differences[name] = max((row[: len(one)] - one).abs().max().item() for row, one in zip(padded, alone))
    assert differences["ours"] < 1e-4 < 0.01 < differences["stock"]
    with torch.no_grad():
        ours(**preprocess(waveforms[0], sampling_rate=16_000, return_tensors="pt"))
        copied = copy.deepcopy(ours)  # as a Trainer puts one on each of several GPUs
        assert torch.equal(copied(**batch).logits, ours(**batch).logits)
    ours(**batch).logits.sum().backward()
    assert ours.hubert.feature_extractor.conv_layers[0].layer_norm.weight.grad.abs().max() > 0


def test_what_cannot_be_fine_tuned_or_exported_is_said_in_one_line(root, capsys):
    for line, words in (
        (
            "fairseq-stack export student --to onnx --output x --speech manifests/test.tsv",
            "it holds a HubertModel; give",
        ),
        (
            "fairseq-stack export manifests --to onnx --output x --speech manifests/test.tsv",
            "cannot be loaded as a fine-tuned",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            run_command(line)
        assert words in str(exit.value.code) and "\n" not in str(exit.value.code)
    assert not (root / "x").exists()


def test_fairseqs_own_recipe_fine_tunes_a_student(root):
    run_command(LETTERS)
    overrides = [f"{name}={value}" for name, value in SMALL.items()]
    overrides += ["+task.pad_audio=true", "+task.random_crop=false", "optimization.max_update=3",
                  f"task.data={root}/letters", f"task.label_dir={root}/letters",
                  f"model.w2v_path={root}/student.pt", f"checkpoint.save_dir={root}/stock",
                  f"common.tensorboard_logdir={root}/tensorboard"]  # fmt: skip
    recipes = Path(fairseq.__file__).parent / "examples/hubert/config/finetune"
    trainer = train("base_10h", overrides, folder=recipes)
    assert trainer.get_num_updates() == 3 and (root / "stock/checkpoint_best.pt").exists()
