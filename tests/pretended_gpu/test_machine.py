"""The pretended GPU computes what the CPU computes, refuses what a GPU refuses, and counts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from training import tiny, train

from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.criterions.layer_distillation import LayerDistillation
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.models.layer_stack import EncoderLayer, LayerStack

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that does not ask CUDA's driver, newer than 2.4")


def test_a_layer_and_its_gradients_are_the_cpus():
    torch.manual_seed(0)
    layer = EncoderLayer(16, 32, 2, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, activation_fn="gelu")
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [5]])
    expected = layer(x, padding)
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    with pretended_gpu() as machine:
        layer.cuda()
        output = layer(x.cuda(), padding.cuda())
        output.square().mean().backward()
        assert output.is_cuda and machine.launches
        torch.testing.assert_close(output.cpu(), expected)
        for name, parameter in layer.named_parameters():
            assert parameter.is_cuda
            torch.testing.assert_close(parameter.grad.cpu(), gradients[name])


def test_what_a_gpu_refuses_is_refused():
    with pretended_gpu():
        on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            on_gpu + on_cpu
        with pytest.raises(RuntimeError, match="same device"):
            on_gpu.add_(on_cpu)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([on_gpu, on_cpu])
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            on_gpu.numpy()
        with pytest.raises(RuntimeError, match="dtype"):
            torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda", dtype=torch.half)
        heads = torch.ones(1, 1, 4, 12, device="cuda")
        with pytest.raises(RuntimeError, match="no fused kernel"):
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        assert torch.equal((on_gpu + torch.tensor(2.0)).cpu(), torch.full((3,), 3.0))  # a number may come from the CPU


def test_another_thread_has_the_gpu_too_and_nobody_has_it_afterwards():
    with pretended_gpu(), ThreadPoolExecutor(1) as pool:
        tensor = torch.ones(3, device="cuda")
        assert pool.submit(lambda: (2 * tensor).tolist()).result() == [2.0] * 3
    with pytest.raises(RuntimeError, match="outside of pretended_gpu"):
        2 * tensor


def test_waits_and_launches_are_counted():
    with pretended_gpu() as machine:
        x = torch.ones(3).cuda(non_blocking=True)
        y = x.reshape(3, 1).t()
        assert not machine.waits and not [place for place in machine.launches.elements() if "reshape" in place]
        for wait in (
            lambda: x[0].item(),
            lambda: bool(x.any()),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.copy_(torch.ones(3)),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: torch.ones(2).cuda(),
        ):
            before = machine.waits.total()
            wait()
            assert machine.waits.total() == before + 1
        before, launches = machine.waits.total(), machine.launches.total()
        (x + y).relu_()
        x[torch.tensor([0, 1])]
        x[x > 0] = 0.0
        assert machine.waits.total() == before and machine.launches.total() == launches + 5


def test_lists_of_tensors_take_as_many_launches_as_their_kernel():
    with pretended_gpu() as machine:
        for count, launches in ((64, 1), (65, 2), (215, 4)):
            tensors = [torch.ones(2, device="cuda") for _ in range(count)]
            before = machine.launches.total()
            torch._foreach_copy_(tensors, [tensor.half() for tensor in tensors])
            assert machine.launches.total() == before + count + launches  # each `half` is one, too
        large = [torch.empty(65536 * 321, device="cuda")]
        before = machine.launches.total()
        torch._foreach_mul_(large, 2.0)
        assert machine.launches.total() == before + 2


def mask_on_the_cpu(monkeypatch):
    terms = LayerDistillation.terms
    monkeypatch.setattr(LayerDistillation, "terms", lambda *args: terms(*args[:-1], args[-1].cpu()))


def numbers_by_numpy(monkeypatch):
    features = HubertEncoder.features
    monkeypatch.setattr(HubertEncoder, "features", lambda *args: torch.from_numpy(features(*args).detach().numpy()))


def gradient_on_the_cpu(monkeypatch):
    class Misplaced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.cpu()

    forward = EncoderLayer.forward
    monkeypatch.setattr(EncoderLayer, "forward", lambda layer, x, *args: forward(layer, Misplaced.apply(x), *args))


def states_in_fp32(monkeypatch):
    forward = LayerStack.forward
    monkeypatch.setattr(LayerStack, "forward", lambda *args: [state.float() for state in forward(*args)])


@pytest.mark.parametrize(
    "plant, says",
    [
        (mask_on_the_cpu, "same device"),
        (numbers_by_numpy, "numpy"),
        (gradient_on_the_cpu, "returned a gradient on cpu"),
        (states_in_fp32, "dtype"),
    ],
)
def test_a_fault_in_the_student_that_the_cpu_forgives_ends_a_training(
    plant, says, monkeypatch, speech, teacher_file, tmp_path
):
    plant(monkeypatch)
    fields = {
        "optimization.max_update": 2,
        "model.stack_method": "none",
        "model.stack_stages": 1,
        "+task.mask_prob": 0.5,
    }
    fields |= {"checkpoint.no_save": True, "common.fp16": True}
    with pretended_gpu(), pytest.raises((RuntimeError, TypeError), match=says):
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))
