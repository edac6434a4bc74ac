"""Every growth method and the plateau schedule in fairseq's real training, on small sizes."""

import re

import numpy as np
import pytest
import torch
from training import tiny, train

from fairseq_stack.growth.growth_similarity import read_growths
from fairseq_stack.growth.surgery import paired_parameters
from fairseq_stack.tasks.speech_distillation import SpeechDistillation


@pytest.fixture
def growths(monkeypatch):
    """Watch a training grow: (update, depth, whether each woken layer is a copy of its source)."""
    seen = []
    grow = SpeechDistillation.grow

    def watched(task, sample, model, criterion, optimizer, update_num, ema_model):
        grow(task, sample, model, criterion, optimizer, update_num, ema_model)
        pairs = paired_parameters(model.encoder.layers, model.plan.growths[model.stage_number - 2])
        seen.append((update_num, model.depth, all(torch.equal(source, woken) for source, woken, _ in pairs)))

    monkeypatch.setattr(SpeechDistillation, "grow", watched)
    return seen


@pytest.mark.parametrize(
    "method, stages, expected",
    [
        ("interleaved", 4, [(2, 6, True), (4, 9, True), (6, 12, True)]),
        ("gradual", 4, [(2, 6, True), (4, 9, True), (6, 12, True)]),
        ("midas", 4, [(2, 6, True), (4, 9, True), (6, 12, True)]),
        ("stackbert", 3, [(3, 6, True), (5, 12, True)]),
        ("gstack", 4, [(4, 12, True)]),
        ("none", 1, []),
    ],
)
def test_every_method_trains_through_its_growths(method, stages, expected, growths, speech, teacher_file, tmp_path):
    fields = {
        "model.stack_method": method,
        "model.stack_stages": stages,
        "model.stack_schedule": "equal",
        "optimization.max_update": 8,
        "optimization.lr": "[0.05]",  # layers with random weights leave their input almost as it is
        "checkpoint.no_save": True,
    }
    model = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).model
    assert growths == expected and model.depth == 12
    similarities = read_growths(tmp_path / "checkpoints")
    assert [(one.update, len(one.after) - 1) for one in similarities] == [
        (update, depth) for update, depth, _ in growths
    ]
    if method in ("gradual", "stackbert", "gstack"):  # copies on top leave the states below them as they were
        for one in similarities:
            kept = len(one.before)
            np.testing.assert_allclose(one.after[:kept, :kept], one.before, atol=1e-4)
        assert np.ptp(similarities[-1].before) > 0.01
    for growth in model.plan.growths:
        for source, woken in growth:
            weights = (model.encoder.layers[seat].fc1.weight for seat in (source, woken))
            assert not torch.equal(*weights), "a copy learns on its own"


def losses_of(messages):
    """Validation losses of a log, {update: loss}."""
    pattern = r"valid on 'valid' subset .*?\| loss ([\d.]+) .*num_updates (\d+)"
    return {int(update): float(loss) for line in messages for loss, update in re.findall(pattern, line)}


def test_a_plateau_wakes_layers_early_and_a_resumed_run_does_so_at_the_same_update(
    growths, speech, teacher_file, tmp_path, monkeypatch, caplog
):
    def run(folder):
        fields = {
            "model.stack_stages": 2,
            "model.stack_schedule": "plateau",
            "model.stack_alpha": 0,
            "+model.stack_patience": 2,
            "optimization.lr": "[0.2]",  # far too much, so that the loss soon rises
            "optimization.max_update": 14,
            "checkpoint.save_interval_updates": 1,
            "common.seed": 3,
        }
        train("librispeech_base", tiny(speech, teacher_file, tmp_path / folder, **fields))
        return torch.load(tmp_path / folder / "checkpoints/checkpoint_last.pt", weights_only=True)["model"]

    caplog.set_level("INFO")
    whole = run("whole")
    losses = losses_of(caplog.messages)
    # Two validations without a loss below that of update 2 end the stage, which has 7 updates at most.
    assert losses[1] > losses[2] < min(losses[3], losses[4])
    assert [update for update, _, _ in growths] == [4]

    train_step = SpeechDistillation.train_step
    for killed_at in (3, 4):  # waiting for the second validation; after it, before the growth

        def interrupted(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
            if update_num == killed_at:
                raise KeyboardInterrupt
            return train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

        monkeypatch.setattr(SpeechDistillation, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    monkeypatch.setattr(SpeechDistillation, "train_step", train_step)
    resumed = run("killed")
    assert [update for update, _, _ in growths] == [4, 4]
    assert whole.keys() == resumed.keys() and "plateau" in whole
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_silent_copies_change_nothing_at_first(speech, teacher_file, tmp_path, caplog):
    """Exactly so in pre-norm. In post-norm, the norms of a new layer still apply."""
    caplog.set_level("INFO")
    fields = {
        "+model.layer_norm_first": True,
        "+model.extractor_mode": "layer_norm",
        "model.stack_schedule": "equal",
        "+model.stack_silent_copies": True,
        "optimization.max_update": 8,
        "optimization.lr": "[0.05]",
        "criterion.teacher_layers": "[12]",
        "checkpoint.no_save": True,
    }
    model = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).model
    losses = re.findall(r"loss on this batch ([\d.]+) -> ([\d.]+)", caplog.text)
    assert model.depth == 12 and len(losses) == 3
    assert all(before == after for before, after in losses)
