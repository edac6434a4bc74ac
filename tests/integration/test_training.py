"""The main job through fairseq's own command line, on small sizes."""

import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
from fork_server import ForkServer
from training import ROOT, command, hydra_train, tiny, train

GROWTHS = [(2, 3, 6), (6, 6, 9), (12, 9, 12)]  # update, depth before, depth after: PROP-1 of 20 updates


def load(path):
    return torch.load(path, weights_only=True)


def run_folder(tmp_path, overrides=()):
    """Keep what a command writes beside its checkpoints out of the checkout."""
    return [
        *overrides,
        f"hydra.output_subdir={tmp_path}/.hydra",
        f"hydra.job_logging.handlers.file.filename={tmp_path}/train.log",
    ]


def readme_command(folder, overrides):
    """The arguments of the README's command, in small."""
    return ["--config-dir", "examples/interleaved", "--config-name", "librispeech_base", *run_folder(folder, overrides)]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def finished(server, speech, teacher_file, tmp_path_factory):
    """One uninterrupted training."""
    folder = tmp_path_factory.mktemp("finished")
    code = server.command(readme_command(folder, tiny(speech, teacher_file, folder)), folder / "log")
    output = (folder / "log").read_text()
    assert code == 0, output
    return folder, output


def test_the_command_grows_through_3_6_9_and_12_layers_and_logs_the_loss_around_each_growth(finished):
    folder, output = finished
    pattern = r"growth \| update (\d+) \| stage \d \| depth (\d+) -> (\d+) \| loss on this batch [\d.]+ -> [\d.]+"
    assert [tuple(map(int, found)) for found in re.findall(pattern, output)] == GROWTHS
    state = load(folder / "checkpoints/checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 20 and state["model"]["stage"] == 3
    for name in ("loss", "output_loss", "intermediate_loss", "layer_4", "layer_8", "layer_12", "teacher_norm"):
        assert re.search(rf"\b{name}=\d", output), name
    assert "stage=4, depth=12" in output


def test_the_teacher_is_not_in_the_checkpoint(finished):
    folder, _ = finished
    names = load(folder / "checkpoints/checkpoint_last.pt")["model"]
    assert all(name.split(".")[0] in
               {"feature_extractor", "layer_norm", "post_extract_proj", "encoder", "heads", "stage", "stage_seats"}
               for name in names)  # fmt: skip


def test_a_run_killed_after_a_growth_continues_at_its_depth_and_ends_with_the_same_weights(
    finished, server, speech, teacher_file, tmp_path
):
    overrides = tiny(speech, teacher_file, tmp_path, **{"checkpoint.save_interval_updates": 1})
    killed, again = tmp_path / "killed.log", tmp_path / "again.log"
    pid = server.start_command(readme_command(tmp_path, overrides), killed)
    while not re.search(r"Saved checkpoint .* 8 updates", killed.read_text()):
        assert server.processes[-1].is_alive(), killed.read_text()
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL, killed.read_text()
    code, output = server.command(readme_command(tmp_path, overrides), again), again.read_text()
    assert code == 0, output
    depths = [int(depth) for depth in re.findall(r"depth=(\d+),", output)]
    assert re.search(r"Loaded checkpoint \S+ \(epoch \d+ @ (8|9) updates\)", output) and depths[0] == 9
    ours, theirs = (load(folder / "checkpoints/checkpoint_last.pt")["model"] for folder in (tmp_path, finished[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_woken_layers_learn_in_the_very_next_step(speech, teacher_file, tmp_path):
    every_update = {"checkpoint.save_interval_updates": 1, "checkpoint.keep_interval_updates": -1}
    # Batches of 3 make epochs of 8 updates; an epoch's last checkpoint would be named after the epoch.
    overrides = tiny(speech, teacher_file, tmp_path, **every_update, **{"dataset.batch_size": 3})
    trainer = train("librispeech_base", overrides)
    index = {name: number for number, (name, _) in enumerate(trainer.model.named_parameters())}
    # The checkpoint of update 6 is written before the growth, that of update 7 after one step with the new layers.
    before, after = (load(next((tmp_path / "checkpoints").glob(f"checkpoint_*_{update}.pt"))) for update in (6, 7))
    assert before["model"]["stage"] == 1 and after["model"]["stage"] == 2
    for source, woken in ((1, 2), (5, 6), (9, 10)):
        for part in ("fc1.weight", "self_attn.q_proj.weight", "final_layer_norm.bias"):
            source_name, woken_name = (f"encoder.layers.{seat}.{part}" for seat in (source, woken))
            copied, learned = before["model"][source_name], after["model"][woken_name]
            assert 0 < (learned - copied).abs().max() < 5e-3
            moments = before["last_optimizer_state"]["state"][index[source_name]]["exp_avg"]
            moved = after["last_optimizer_state"]["state"][index[woken_name]]["exp_avg"]
            gradient = (moved - 0.9 * moments) / 0.1
            assert gradient.abs().max() > 0 and moved.isfinite().all()
            assert index[woken_name] not in before["last_optimizer_state"]["state"]


def test_the_older_command_line_trains_too(speech, teacher_file, tmp_path):
    """As a module, as torchrun starts it: its functions are then those of __main__."""
    run = command(
        "python", "-m", "fairseq_cli.train", speech, "--user-dir", "fairseq_stack", "--task", "speech_distillation",
        "--teacher", teacher_file, "--arch", "stacked_hubert", "--criterion", "layer_distillation",
        "--conv-feature-layers", "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2", "--encoder-embed-dim", 16,
        "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 4, "--conv-pos", 8, "--conv-pos-groups", 4,
        "--stack-schedule", "equal", "--teacher-layers", "4,8,12", "--optimizer", "adam", "--lr", 0.0005,
        "--batch-size", 4, "--required-batch-size-multiple", 1, "--max-update", 8, "--save-dir", tmp_path, "--num-workers", 0, "--log-format", "simple",
        "--store-ema", "--ema-decay", 0.9,
    )  # fmt: skip
    output, _ = run.communicate()
    assert run.returncode == 0, output
    last = load(tmp_path / "checkpoint_last.pt")
    assert last["model"]["stage"] == last["extra_state"]["ema"]["stage"] == 3


def test_recipes_work_from_any_folder_with_an_absolute_user_dir(speech, teacher_file, tmp_path):
    overrides = [
        *tiny(speech, teacher_file, "run"),
        f"common.user_dir={ROOT}/fairseq_stack",
        "optimization.max_update=10",
    ]
    run = hydra_train("librispeech_base", overrides, config_dir=ROOT / "examples/interleaved", cwd=tmp_path)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert (tmp_path / "run/checkpoints/checkpoint_last.pt").exists()
    assert (tmp_path / "outputs/librispeech_base/train.log").exists()


def test_data_workers_end_with_their_epoch(speech, teacher_file, tmp_path):
    before = set(multiprocessing.active_children())
    train(
        "librispeech_base",
        tiny(speech, teacher_file, tmp_path, **{"dataset.num_workers": 2, "checkpoint.no_save": True}),
    )
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
