"""A woken layer carries its source's weights, fp32 masters and moments, in every precision of fairseq."""

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer
from omegaconf import OmegaConf

from fairseq_stack.growth.surgery import (
    copy_optimizer_state,
    copy_weights,
    paired_parameters,
)

GROWTH = [(0, 1), (2, 3), (1, 4)]  # the last one copies a copy


def make_layers(dtype):
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(5)).to(dtype)


def make_optimizer(kind, layers, monkeypatch):
    """fairseq's real optimisers. On a CPU fairseq keys its flat buffer by a CUDA device, so that is stood in for."""
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.optimizer = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.1, "lr": [0.1],
                     "use_old_adam": True, "fp16_adam_stats": False, "tpu": False}  # fmt: skip
    params = list(layers.parameters())
    if kind == "fp32":
        return build_optimizer(cfg.optimizer, params)
    cfg.common.bf16 = kind != "flat"
    if kind == "memory-efficient bf16":
        return MemoryEfficientFP16Optimizer.build_optimizer(cfg, params)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return FP16Optimizer.build_optimizer(cfg, params)


KINDS = {"fp32": torch.float32, "flat": torch.float16, "bf16": torch.bfloat16, "memory-efficient bf16": torch.bfloat16}


def step(layers, optimizer, seats):
    """One update in which only the layers in `seats` get gradients, as with idle seats in training."""
    optimizer.zero_grad()
    inputs = torch.arange(1.0, 6.0, dtype=next(layers.parameters()).dtype)
    sum((layers[seat](inputs).float().square().sum() * (seat + 1)) for seat in seats).backward()
    optimizer._needs_sync = True
    optimizer.step()


def masters_and_moments(layers, optimizer):
    """{(seat, parameter): (master, exp_avg, exp_avg_sq)} read out by hand from fairseq's optimiser."""
    named = [((seat, name), value) for seat, layer in enumerate(layers) for name, value in layer.named_parameters()]
    masters = getattr(optimizer, "fp32_params", None)
    state = optimizer.optimizer.state
    found, offset = {}, 0
    for position, (key, value) in enumerate(named):
        if isinstance(masters, dict):
            (flat,) = masters.values()
            cut = slice(offset, offset + value.numel())
            offset += value.numel()
            found[key] = [flat.data[cut], state[flat]["exp_avg"][cut], state[flat]["exp_avg_sq"][cut]]
        else:
            owner = masters[position] if masters else value
            found[key] = [owner.data, state[owner]["exp_avg"], state[owner]["exp_avg_sq"]]
    return {key: [part.clone().flatten() for part in parts] for key, parts in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moments", ["copy", "reset", "silent"])
def test_weights_masters_and_moments_follow_the_source(kind, moments, monkeypatch):
    layers = make_layers(KINDS[kind])
    optimizer = make_optimizer(kind, layers, monkeypatch)
    for _ in range(3):
        step(layers, optimizer, seats=(0, 2))
    silent = moments == "silent"
    pairs = list(paired_parameters(layers, GROWTH, silent=[""] if silent else []))  # the layer itself has the weights
    copy_weights(pairs)
    copy_optimizer_state(optimizer, pairs, "copy" if silent else moments)
    kept = masters_and_moments(layers, optimizer)
    for woken, ancestor in ((1, 0), (3, 2), (4, 0)):
        for name in ("weight", "bias"):
            master, first, second = kept[woken, name]
            source_master, source_first, source_second = kept[ancestor, name]
            expected = torch.zeros_like(source_master) if silent else source_master
            assert torch.equal(getattr(layers[woken], name).flatten(), expected.to(KINDS[kind]))
            assert torch.equal(master, expected)
            if moments == "copy":
                assert torch.equal(first, source_first) and torch.equal(second, source_second)
            else:
                assert not first.any() and not second.any()
            assert source_first.any() and source_second.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_layer_moves_exactly_as_its_source_would(kind, monkeypatch):
    layers = make_layers(KINDS[kind])
    optimizer = make_optimizer(kind, layers, monkeypatch)
    for _ in range(3):
        step(layers, optimizer, seats=(0, 2))
    pairs = list(paired_parameters(layers, [(0, 1)]))
    copy_weights(pairs)
    copy_optimizer_state(optimizer, pairs, "copy")
    before = layers[1].weight.detach().clone()
    optimizer.zero_grad()
    inputs = torch.arange(1.0, 6.0, dtype=KINDS[kind])
    (layers[0](inputs).float().square().sum() + layers[1](inputs).float().square().sum()).backward()
    optimizer._needs_sync = True
    optimizer.step()
    assert torch.equal(layers[1].weight, layers[0].weight)
    assert not torch.equal(layers[1].weight, before)


@pytest.mark.parametrize("kind", ["flat", "bf16"])
def test_without_the_masters_a_copied_weight_would_be_lost(kind, monkeypatch):
    """The trap that the surgery is for: should fairseq stop overwriting, the surgery could be simpler."""
    layers = make_layers(KINDS[kind])
    optimizer = make_optimizer(kind, layers, monkeypatch)
    step(layers, optimizer, seats=(0, 2))
    copy_weights(list(paired_parameters(layers, [(0, 1)])))
    step(layers, optimizer, seats=(2,))
    assert not torch.allclose(layers[1].weight, layers[0].weight, atol=1e-2)
