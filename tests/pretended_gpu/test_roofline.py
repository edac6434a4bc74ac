"""The roofline counts what kernels read, write and compute, and the recipe's update stays within its limits."""

import json
from functools import partial

import pytest
import torch
from training import EXAMPLES

from fairseq_stack.benchmark import ours
from fairseq_stack.benchmark.inputs import make_inputs
from fairseq_stack.benchmark.ours import Case, Ours
from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.benchmark.roofline import COUNTS, GPUS, Gpu, Shapes, named_gpu, roofline
from fairseq_stack.errors import InputError

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that does not ask CUDA's driver, newer than 2.4")

GPU = Gpu(bandwidth=1e9, half=1e12, tf32=4e11, fp32=1e11, attention=2e11, launch=1e-6)


def counts(machine, compute):
    before = machine.now()
    compute()
    return dict(zip(COUNTS, (machine.now() - before).tolist()))


def test_a_kernel_takes_what_its_bytes_its_products_or_its_launch_need():
    with pretended_gpu(Shapes(GPU)) as machine:
        x, half = torch.ones(1000, 1000, device="cuda"), torch.ones(1000, 1000, device="cuda", dtype=torch.half)
        small = torch.ones(2, 3, device="cuda")
        assert counts(machine, lambda: x + x.clone()[:1].expand(1000, 1000)) == pytest.approx(
            {"seconds": (8e6 + 8.004e6) / 1e9, "launches": 2, "waits": 0, "flops": 0, "bytes": 16.004e6}
        )
        assert counts(machine, lambda: x.add_(torch.ones_like(x)))["bytes"] == 4e6 + 12e6
        assert counts(machine, lambda: x @ x)["seconds"] == pytest.approx(2e9 / 1e11)
        assert counts(machine, lambda: half @ half)["flops"] == 2e9
        assert counts(machine, lambda: small * 2)["seconds"] == pytest.approx(1e-6)
        assert counts(machine, lambda: small.t())["launches"] == 0
        assert counts(machine, lambda: small.sum().item())["waits"] == 1


def test_integers_and_masks_have_their_numbers():
    with pretended_gpu(Shapes(GPU)):
        valid = torch.arange(4, device="cuda") < torch.tensor([[3], [2]]).cuda()
        assert torch.randn(2, 4, 8, device="cuda")[valid].shape == (5, 8)
        assert int(valid.sum()) == 5


def test_memory_is_held_until_nobody_has_it():
    with pretended_gpu(Shapes(GPU)) as machine:
        x = torch.zeros(1000, device="cuda")
        view = x[:10]
        assert machine.held == 4000
        del x
        assert machine.held == 4000
        y = view + 1
        assert (machine.held, machine.peak) == (4040, 4040)
        del view
        assert (machine.held, machine.peak) == (40, 4040)
        del y
        assert machine.held == 0


def recipe(folder, cnn):
    """The recipe's training on 64 utterances of 12 s."""
    make_inputs(folder, "paper", 12, utterances=4 * 64)
    return partial(Ours, EXAMPLES / "interleaved", folder, "paper", 64, "cuda", Case("fp16", "live", cnn))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two utterances of 2 s for each of four updates of the paper's student."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, "paper", 2, utterances=8)
    return folder


@pytest.fixture(scope="module")
def update(tmp_path_factory):
    """Counts of an update of the recipe at 3 and 12 layers."""
    return roofline(recipe(tmp_path_factory.mktemp("inputs"), "trained"), (3, 12), GPUS["h100"])


def total(update, depth, count):
    return sum(part[count] for part in update[depth]["parts"].values())


def test_the_products_of_an_update_are_those_of_its_layers(update):
    """Reckoned by hand on 599 frames; the backward pass takes twice the forward pass, but no gradient of the waveform."""
    frames, utterances = 599, 64
    cnn = sum(
        length * inputs * 512 * kernel
        for length, inputs, kernel in zip(
            (38399, 19199, 9599, 4799, 2399, 1199, 599), (1, *[512] * 6), (10, 3, 3, 3, 3, 2, 2)
        )
    )

    def layers(count, width, inner):
        return count * frames * (4 * width**2 + 2 * width * inner + 2 * frames * width)

    def start(width):
        # The positional convolution: 38 blocks of 16 frames, and a kernel of 128 in a matrix of 143 frames
        return frames * 512 * width + 38 * 16 * 143 * width * width // 16

    teacher = cnn + start(768) + layers(12, 768, 3072)
    for depth in (3, 12):
        student = cnn + start(384) + layers(depth, 384, 1536) + 3 * frames * 384 * 768
        scores = depth * frames**2 * 384  # flash attention's backward pass computes them again
        products = 2 * utterances * (teacher + 3 * student + scores - 38399 * 512 * 10)
        assert total(update, depth, "flops") == pytest.approx(products, rel=0.005)


def test_an_update_of_the_recipe_stays_within_its_launches_waits_time_and_memory(update):
    for depth, launches in ((3, 595), (12, 930)):
        assert total(update, depth, "launches") <= launches
        assert total(update, depth, "waits") == 1
        assert update[depth]["parts"]["optimiser"]["launches"] <= 30
    assert total(update, 12, "seconds") < 0.08
    assert total(update, 12, "bytes") < 162.7e9
    assert update[12]["peak_memory"] < 20.2 * 2**30


def test_an_update_with_a_shared_cnn_stays_within_its_time_and_memory(tmp_path):
    shared = roofline(recipe(tmp_path, "shared"), (12,), GPUS["h100"])
    assert total(shared, 12, "seconds") < 0.054
    assert total(shared, 12, "bytes") < 110.7e9
    assert shared[12]["peak_memory"] < 7.8 * 2**30


def test_the_costs_of_all_lines_are_those_of_an_update(update):
    lines = update[12]["lines"]
    for count in ("seconds", "launches", "bytes"):
        assert sum(line[count] for line in lines.values()) == pytest.approx(total(update, 12, count), rel=0.002)
    assert {"models/conv_extractor.py", "models/layer_stack.py"} < {line.split(":")[0] for line in list(lines)[:8]}
    assert any(line.startswith("models/gpu_attention.py:") and line.endswith(", backward") for line in lines)


def test_heads_of_48_features_take_the_time_of_heads_of_64():
    with pretended_gpu(Shapes(GPU)) as machine:
        seconds = {}
        for size in (48, 64):
            row, limits = torch.ones(800, 8, size, device="cuda").half(), torch.tensor([0, 400, 800]).int().cuda()
            flash = partial(torch.ops.aten._flash_attention_forward, row, row, row, limits, limits, 400, 400)
            found = counts(machine, lambda: flash(0.0, False, False))
            assert found["flops"] == 2 * 4 * 400**2 * 8 * size
            seconds[size] = found["seconds"]
        assert seconds[48] == seconds[64] == pytest.approx(2 * 4 * 400**2 * 8 * 64 / GPU.attention)


def with_masks(cfg):
    cfg.task.mask_prob = cfg.model.mask_prob = 0.5


def with_muon(cfg):
    cfg.optimizer = {**cfg.optimizer, "_name": "muon", "momentum": 0.95}


@pytest.mark.parametrize("change, launches", [(with_masks, 30), (with_muon, 180)])
def test_the_cpu_waits_once_for_an_update_with_masked_frames_or_muon(change, launches, inputs, monkeypatch):
    configured = ours.configuration

    def changed(*args):
        cfg = configured(*args)
        change(cfg)
        return cfg

    monkeypatch.setattr(ours, "configuration", changed)
    make = partial(Ours, EXAMPLES / "interleaved", inputs, "paper", 2, "cuda", Case("bf16", "live", "trained"))
    update = roofline(make, (3,), GPUS["h100"])
    assert total(update, 3, "waits") == 1
    assert update[3]["parts"]["optimiser"]["launches"] <= launches


def test_a_gpu_is_named_or_described_by_a_file(tmp_path):
    (tmp_path / "gpu.json").write_text(
        json.dumps({"bandwidth": 1e12, "half": 1e14, "tf32": 5e13, "fp32": 2e13, "attention": 3e13})
    )
    assert named_gpu("h100") is GPUS["h100"] and named_gpu(tmp_path / "gpu.json").launch == 2e-6
    (tmp_path / "bad.json").write_text('{"bandwidth": "fast"}')
    for name, says in (("h999", "none of h100"), (tmp_path / "bad.json", "positive numbers: bandwidth")):
        with pytest.raises(InputError, match=says):
            named_gpu(name)
