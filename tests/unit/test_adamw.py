"""Our adamw is fairseq's adam, in fewer kernels."""

import copy

import pytest
import torch
from fairseq import optim
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import fairseq_stack
from fairseq_stack.training.optimizers import save_whole_state

KINDS = {
    "fp32": (torch.float32, {}),
    "flat fp16": (torch.float16, {"fp16": True}),
    "fp16": (torch.float16, {"fp16": True, "fp16_no_flatten_grads": True}),
    "bf16": (torch.bfloat16, {"bf16": True}),
    "memory-efficient fp16": (torch.float16, {"fp16": True, "memory_efficient_fp16": True}),
    "AMP": (torch.float32, {"amp": True}),
}
fairseq_stack.register()


def make(name, kind, seed=0, clip=None):
    """Three layers and fairseq's optimizer for them."""
    dtype, fields = KINDS[kind]
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3)).to(dtype)
    cfg = OmegaConf.structured(FairseqConfig())
    # A gradient of the size of epsilon shows where epsilon is added.
    cfg.optimizer = {"_name": name, "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-2, "weight_decay": 0.1, "lr": [0.1]}
    if name == "adam":
        cfg.optimizer.update({"use_old_adam": True, "fp16_adam_stats": False, "tpu": False})
    cfg.common = OmegaConf.merge(cfg.common, fields, {"fp16_scale_window": 3})
    parameters = list(layers.parameters())
    if "memory_efficient_fp16" in fields:
        optimizer = optim.MemoryEfficientFP16Optimizer.build_optimizer(cfg, parameters)
    elif "amp" in fields:
        optimizer = optim.AMPOptimizer.build_optimizer(cfg, parameters)
    elif fields:
        optimizer = optim.FP16Optimizer.build_optimizer(cfg, parameters)
    else:
        optimizer = optim.build_optimizer(cfg.optimizer, parameters)
    save_whole_state(optimizer, cfg)
    return layers, optimizer


def update(layers, optimizer, number, used=(0, 1), clip_norm=0.0):
    optimizer.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(layers[0].weight.dtype)
    optimizer.backward(sum(0.01 * layers[seat](x).float().square().mean() for seat in used))
    optimizer.multiply_grads(0.5)
    norm = optimizer.clip_grad_norm(clip_norm)
    optimizer.step()
    return norm


def assert_close(ours, theirs):
    """Of the layers in use; fairseq's adam decays the weights of the third if the masters are flat."""
    for one, other in zip(ours[:2].parameters(), theirs[:2].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 2e-3, atol=1e-6)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    # On a CPU fairseq keys its flat buffer by a CUDA device, so that is stood in for.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_norms_and_state_are_those_of_adam(kind, clip_norm):
    (ours, optimizer), (theirs, reference) = make("adamw", kind), make("adam", kind)
    before = copy.deepcopy(ours.state_dict())
    for number in range(10):
        norms = [update(*each, number, clip_norm=clip_norm) for each in ((ours, optimizer), (theirs, reference))]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0)
    assert_close(ours, theirs)
    assert not torch.allclose(ours[0].weight, before["0.weight"])
    state, expected = optimizer.state_dict(), reference.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for key, moments in expected["state"].items():
        assert state["state"][key].keys() == moments.keys() and state["state"][key]["step"] == moments["step"]
        torch.testing.assert_close(state["state"][key]["exp_avg_sq"], moments["exp_avg_sq"], rtol=2e-2, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_the_state_of_adam_and_adam_loads_its_state(kind):
    trained = make("adam", kind)
    for number in range(5):
        update(*trained, number)
    resumed = [make("adamw", kind, seed=1), make("adam", kind, seed=1)]
    for layers, optimizer in resumed:
        layers.load_state_dict(trained[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(trained[1].state_dict()))
    for number in range(5, 8):
        for each in resumed:
            update(*each, number)
    assert_close(resumed[0][0], resumed[1][0])
    back = make("adam", kind, seed=2)
    back[0].load_state_dict(resumed[0][0].state_dict())
    back[1].load_state_dict(copy.deepcopy(resumed[0][1].state_dict()))
    for each in (back, resumed[1]):
        update(*each, 8)
    assert_close(back[0], resumed[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_a_gradient_keep_their_weights(kind):
    layers, optimizer = make("adamw", kind)
    idle = copy.deepcopy(layers[2].state_dict())
    for number in range(3):
        update(layers, optimizer, number)
    assert all(torch.equal(value, idle[name]) for name, value in layers[2].state_dict().items())
    update(layers, optimizer, 3, used=(0, 1, 2))
    assert not torch.equal(layers[2].weight, idle["weight"])
