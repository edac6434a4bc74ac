"""On a GPU, attention skips the padding without a mask and without a wait, and has the CPU's numbers."""

import pytest
import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.models.gpu_attention import flash_spans, gpu_attention
from fairseq_stack.models.layer_stack import LayerStack

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that does not ask CUDA's driver, newer than 2.4")

FRAMES = [13, 9, 13, 5]


def stack():
    torch.manual_seed(0)
    shape = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}
    return LayerStack(Wav2Vec2Config(**shape, **none, conv_pos=8, conv_pos_groups=1))


def states_and_gradients(layers, x, frames):
    """The hidden states of valid frames, and the gradient of their weighted sum for each parameter."""
    valid = torch.arange(13)[None] < torch.tensor(FRAMES)[:, None]
    states = torch.stack(layers(x, frames, range(2)))
    weights = (valid[:, :, None] * torch.linspace(-1, 1, 32)).to(states.device)
    (states.float() * weights).sum().backward()
    return states.float().cpu()[:, valid], {name: each.grad.float().cpu() for name, each in layers.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_and_gradients_of_valid_frames_are_the_cpus(dtype):
    layers, x, frames = stack().to(dtype), torch.randn(4, 13, 32).to(dtype), torch.tensor(FRAMES)
    expected, expected_gradients = states_and_gradients(layers.float(), x.float(), frames)
    layers.zero_grad()
    with pretended_gpu() as machine:
        found, gradients = states_and_gradients(layers.to(dtype).cuda(), x.cuda(), frames)
        assert not [place for _, place in machine.waits if place and place.startswith("models/")]
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    for name, gradient in expected_gradients.items():
        scale = max(gradient.abs().max().item(), 0.1)
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2 * tolerance * scale, msg=name)


def test_flash_attention_with_dropout_has_the_gradients_of_its_weights():
    torch.manual_seed(0)
    with pretended_gpu():
        query, key, value = (torch.randn(2, 4, 9, 8, device="cuda").half().requires_grad_() for _ in range(3))
        spans = flash_spans(torch.empty(2, 9, 32, device="cuda"), torch.half, 8, torch.tensor([9, 6]))
        assert spans.tolist() == [0, 9, 9, 15, 18]
        output, kept = (gpu_attention(query, key, value, spans, dropout) for dropout in (0.5, 0.0))
        assert not torch.equal(output.cpu(), kept.cpu())
        upstream = torch.randn(2, 4, 9, 8, device="cuda")
        (output * upstream).sum().backward()
        # The output is linear in the values, with the weights that dropout left.
        from_values, from_output = (value.float() * value.grad).sum(), (output * upstream).sum()
        torch.testing.assert_close(from_values.cpu(), from_output.cpu(), rtol=0.02, atol=0.1)


def test_flash_attention_is_used_where_a_gpu_has_it(monkeypatch):
    with pretended_gpu():
        x, frames = torch.empty(4, 13, 32, device="cuda"), torch.tensor(FRAMES)
        assert flash_spans(x, torch.bfloat16, 48, frames) is not None
        assert flash_spans(x, torch.float32, 48, frames) is None
        assert flash_spans(x, torch.half, 12, frames) is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert flash_spans(x, torch.half, 48, frames) is None


def test_the_pretended_gpu_refuses_what_flash_attention_refuses():
    def heads(size=8, dtype=torch.half):
        return [torch.zeros(18, 4, size, device="cuda", dtype=dtype)] * 3

    def flash(heads, limits, longest=9):
        torch.ops.aten._flash_attention_forward(*heads, limits, limits, longest, longest, 0.0, False, False)

    with pretended_gpu():
        limits = torch.tensor([0, 9, 9, 15, 18], dtype=torch.int32)
        flash(heads(), limits.cuda())
        for arguments, says in (
            ((heads(), limits), "same device"),
            ((heads(dtype=torch.float32), limits.cuda()), "takes fp16 or bf16"),
            ((heads(12), limits.cuda()), "multiple of 8"),
            ((heads(), limits.cuda().long()), "int32"),
            ((heads(), limits[:-1].cuda()), "do not fit 18 frames"),
            ((heads(), limits.cuda(), 8), "do not fit 18 frames"),
        ):
            with pytest.raises(RuntimeError, match=says):
                flash(*arguments)
        query = torch.zeros(2, 4, 9, 8, device="cuda").half()
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device="cuda")
        F.scaled_dot_product_attention(query, query, query, mask)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="takes no mask"):
            F.scaled_dot_product_attention(query, query, query, mask)
