"""What must hold right after a growth in fairseq's real training, in every precision."""

import torch
from fairseq.utils import apply_to_sample

from fairseq_stack.models.stacked_hubert import StackedHubert
from fairseq_stack.tasks.speech_distillation import SpeechDistillation


def masters_and_moments(optimizer, parameters):
    """{parameter: [fp32 master, first moment, second moment]}, read by hand out of fairseq's optimisers.

    The optimiser's own parameters are the masters: one flat buffer (fp16), one for each parameter (bf16), or the
    weights themselves (fp32, AMP and memory-efficient half precision).
    """
    owners = getattr(optimizer, "fp32_params", parameters)
    owners = list(owners.values() if isinstance(owners, dict) else owners)
    trained = {owner for group in optimizer.optimizer.param_groups for owner in group["params"]}
    assert trained == set(owners)
    state = optimizer.optimizer.state
    parts = [[owner.data, *(state[owner].get(name) for name in ("exp_avg", "exp_avg_sq"))] for owner in owners]
    if len(owners) == 1 < len(parameters):
        sizes = [parameter.numel() for parameter in parameters]
        assert len(owners[0]) == sum(sizes)
        parts = list(zip(*(part.split(sizes) for part in parts[0])))
    assert len(parts) == len(parameters)
    return {
        parameter: [None if part is None else part.reshape(parameter.shape).clone() for part in found]
        for parameter, found in zip(parameters, parts)
    }


def check_growth(task, sample, model, criterion, optimizer):
    """Masters, moments, working weights and loss right after a growth."""
    found = masters_and_moments(optimizer, [value for value in model.parameters() if value.requires_grad])
    for parameter, (master, *_) in found.items():
        assert torch.equal(master.to(parameter.dtype), parameter)
    layers = model.encoder.layers
    for source_seat, seat in model.plan.growths[model.stage_number - 2]:
        for name, source in layers[source_seat].named_parameters():
            woken = layers[seat].get_parameter(name)
            silent = model.cfg.stack_silent_copies and name.startswith(("self_attn.out_proj.", "fc2."))
            for of_source, of_woken in [(source, woken), *zip(found[source], found[woken])]:
                if of_source is not None or of_woken is not None:  # Muon has one moment
                    assert torch.equal(of_woken, torch.zeros_like(of_source) if silent else of_source)
            assert found[source][1].any() or not source.any()

    # A model of this depth made from the masters has the same loss, and in fp32 the same but for rounding:
    # nothing of the growth is elsewhere.
    masters = {name: found[value][0] for name, value in model.named_parameters() if value in found}
    state = {"cfg": {"model": model.cfg}, "model": {**model.state_dict(), **masters}}
    fresh = StackedHubert.from_checkpoint(state).to(model.layer_norm.weight.device)
    assert fresh.depth == model.depth
    loss = task._loss(sample, model, criterion, optimizer)
    in_fp32 = apply_to_sample(lambda value: value.float() if value.is_floating_point() else value, sample)
    torch.testing.assert_close(loss, task._loss(in_fp32, fresh, criterion, optimizer), rtol=1e-2, atol=0)
    assert task._loss(sample, fresh.to(model.layer_norm.weight.dtype), criterion, optimizer) == loss


def check_every_growth(monkeypatch):
    """Check each growth of the trainings that follow; returns a list that fills with their updates."""
    checked = []
    grow = SpeechDistillation.grow

    def watched(task, sample, model, criterion, optimizer, update_num, ema_model):
        grow(task, sample, model, criterion, optimizer, update_num, ema_model)
        check_growth(task, sample, model, criterion, optimizer)
        checked.append(update_num)

    monkeypatch.setattr(SpeechDistillation, "grow", watched)
    return checked
