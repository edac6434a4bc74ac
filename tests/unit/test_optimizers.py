"""The classes in fairseq's place save the whole state and are fairseq's in everything else."""

import copy

import pytest
import torch
from conftest import LINKED, TINY
from fairseq import optim
from fairseq.dataclass.configs import EMAConfig, FairseqConfig
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.training import optimizers
from fairseq_stack.training.moving_average import MovingAverage

KINDS = {
    "flat fp16": (optim.FP16Optimizer, {"fp16": True}),
    "fp16": (optim.FP16Optimizer, {"fp16": True, "fp16_no_flatten_grads": True}),
    "bf16": (optim.FP16Optimizer, {"bf16": True}),
    "memory-efficient fp16": (optim.MemoryEfficientFP16Optimizer, {"fp16": True, "memory_efficient_fp16": True}),
}
AMP = (optim.AMPOptimizer, {"amp": True, "amp_init_scale": 1024, "amp_scale_window": 3})


def make_layer(kind, seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 3).to(torch.bfloat16 if kind == "bf16" else torch.float16)


def make_optimizer(kind, layer):
    optimizer_class, fields = AMP if kind == "amp" else KINDS[kind]
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.optimizer = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.1, "lr": [0.1],
                     "use_old_adam": True, "fp16_adam_stats": False, "tpu": False}  # fmt: skip
    cfg.common = OmegaConf.merge(cfg.common, fields, {"fp16_scale_window": 3})
    optimizer = optimizer_class.build_optimizer(cfg, list(layer.parameters()))
    optimizers.save_whole_state(optimizer, cfg)
    return optimizer


def step(layer, optimizer, scale):
    optimizer.zero_grad()
    inputs = scale * torch.ones(2, 3, dtype=layer.weight.dtype)
    optimizer.backward(layer(inputs).float().square().sum())
    try:
        optimizer.clip_grad_norm(0.0)
        optimizer.step()
    except OverflowError:
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_goes_on_from_its_state_as_if_it_had_not_stopped(kind, monkeypatch):
    # On a CPU fairseq keys its flat buffer by a CUDA device, so that is stood in for.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    layer = make_layer(kind, seed=0)
    optimizer = make_optimizer(kind, layer)
    for scale in (1, 1, 1e4, 1, 1):  # 1e4 is too much for fp16, which then halves the loss scale
        step(layer, optimizer, scale)
    again = make_layer(kind, seed=1)
    again.load_state_dict(layer.state_dict())
    resumed = make_optimizer(kind, again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as on disk
    for scale in (1, 1, 1e4, 1, 1, 1):
        for one, its_optimizer in ((layer, optimizer), (again, resumed)):
            step(one, its_optimizer, scale)
        assert torch.equal(layer.weight, again.weight)
        if optimizer.scaler is not None:
            assert vars(optimizer.scaler) == vars(resumed.scaler)


def test_the_counters_are_all_that_fairseqs_loss_scaler_changes_beside_its_scale():
    scaler = DynamicLossScaler(scale_window=2)
    before = dict(vars(scaler))
    for gradient_norm in (1.0, float("inf"), 1.0, 1.0):
        try:
            scaler.check_overflow(gradient_norm)
            scaler.update()
        except OverflowError:
            pass
    assert {name for name, value in vars(scaler).items() if value != before[name]} <= {
        "loss_scale",
        *optimizers._COUNTERS,
    }
    assert set(optimizers._COUNTERS) <= before.keys()


def test_masters_of_idle_layers_are_left_alone_until_they_wake():
    layers = torch.nn.ModuleList(make_layer("bf16", seed) for seed in (0, 1))
    optimizer = make_optimizer("bf16", layers)
    asleep = [master.data.clone() for master in optimizer.masters[2:]]
    step(layers[0], optimizer, 1)
    for master, before in zip(optimizer.masters[2:], asleep):
        assert torch.equal(master, before) and master not in optimizer.optimizer.state
    step(layers[1], optimizer, 1)
    assert all(optimizer.optimizer.state[master]["exp_avg"].any() for master in optimizer.masters[2:])
    assert not torch.equal(layers[1].weight.float(), asleep[0])


@pytest.mark.parametrize("in_fp32", [False, True])
def test_a_step_of_the_moving_average_is_fairseqs_but_reads_no_number(in_fp32):
    """Reading a number of a tensor on a GPU makes the CPU wait for it."""
    cfg = OmegaConf.structured(StackedHubertConfig(**{**TINY, **LINKED, "head_shared": True}))
    torch.manual_seed(0)
    model = StackedHubert(cfg, {4: 8, 12: 8}, teacher_depth=12)
    settings = OmegaConf.structured(EMAConfig(store_ema=True, ema_decay=0.9, ema_fp32=in_fp32))
    average = MovingAverage(model, settings)
    expected = {name: value.double() for name, value in average.model.named_parameters()}
    for update in (1, 2):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        with NumbersRead() as read:
            average.step(model, update)
        assert read.count == 0
        for name, parameter in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.data.double()
    for name, value in average.model.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    for name in average.fp32_params:
        assert torch.equal(average.fp32_params[name], average.model.state_dict()[name])


class NumbersRead(TorchDispatchMode):
    """Counts how often a number of a tensor is read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# Automatic mixed precision


def amp_update(layer, optimizer, inputs, clip_norm):
    """One update as fairseq's trainer makes it, of two batches; returns the gradients that Adam receives."""
    received = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: received.extend(parameter.grad.clone() for parameter in layer.parameters())
    )
    try:
        optimizer.zero_grad()
        for batch in inputs:
            optimizer.backward(layer(batch).square().sum())
        optimizer.multiply_grads(1 / 7)
        optimizer.clip_grad_norm(clip_norm)
        optimizer.step()
    finally:
        hook.remove()
    return received


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_amp_gives_adam_the_clipped_gradient(clip_norm):
    layer = torch.nn.Linear(3, 3)
    inputs = torch.randn(2, 5, 3)
    reference = copy.deepcopy(layer)
    (reference(inputs).square().sum() / 7).backward()
    gradients = [parameter.grad for parameter in reference.parameters()]
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
    optimizer = make_optimizer("amp", layer)
    assert optimizer.scaler.get_scale() == 1024
    torch.testing.assert_close(amp_update(layer, optimizer, inputs, clip_norm), gradients)


def test_amp_skips_an_overflow_halves_its_scale_and_raises_it_again():
    layer = torch.nn.Linear(3, 3)
    optimizer = make_optimizer("amp", layer)
    before = copy.deepcopy(layer.state_dict())
    assert not amp_update(layer, optimizer, torch.full((2, 5, 3), 1e18), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    scales = []
    for _ in range(4):
        assert amp_update(layer, optimizer, torch.ones(2, 5, 3), 0.5)
        scales.append(optimizer.scaler.get_scale())
    assert scales == [512, 512, 1024, 1024]


def test_amp_resumes_with_its_scale_and_its_count_of_updates():
    layer = torch.nn.Linear(3, 3)
    optimizer = make_optimizer("amp", layer)
    amp_update(layer, optimizer, torch.ones(2, 5, 3), 0.5)
    resumed = make_optimizer("amp", copy.deepcopy(layer))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (
        resumed.scaler.state_dict() == optimizer.scaler.state_dict() and optimizer.scaler.state_dict()["scale"] == 1024
    )
    assert optimizer.scaler.state_dict()["_growth_tracker"] == 1
