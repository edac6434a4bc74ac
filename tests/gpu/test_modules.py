"""On a GPU, the student's modules give the CPU's values and gradients, to the rounding of each precision."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.teachers.fairseq_checkpoint import BASE_SHAPE, NO_TRAINING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Features of a head that flash attention takes as they are, and some that it pads
SHAPES = {
    "HuBERT": {"encoder_embed_dim": 128, "encoder_attention_heads": 2, "conv_pos": 128, "conv_pos_groups": 16},
    "student": {"encoder_embed_dim": 96, "encoder_attention_heads": 2, "conv_pos": 128, "conv_pos_groups": 16},
    "pre-norm": {
        "encoder_embed_dim": 64,
        "encoder_attention_heads": 4,
        "layer_norm_first": True,
        "extractor_mode": "layer_norm",
        "conv_bias": True,
    },
}
SCALE = 1000
# Of a whole tensor, relative to its norm; convolutions in fp32 use TF32.
ERRORS = {torch.float32: 1e-2, torch.float16: 4e-2, torch.bfloat16: 3e-1}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_and_gradients_are_the_cpus(shape, dtype):
    torch.manual_seed(0)
    fields = {**BASE_SHAPE, **TINY, **NO_TRAINING, "feature_grad_mult": 1.0, "encoder_layers": 3, **SHAPES[shape]}
    model = HubertEncoder(SimpleNamespace(**fields)).eval()
    waveforms, lengths = torch.randn(3, 40_000), torch.tensor([40_000, 25_000, 40_000])

    def computed(waveforms):
        model.zero_grad()
        states, frames = model.encode(model.features(waveforms, lengths), lengths, range(3))
        last = torch.cat([state[:count] for state, count in zip(states[-1], frames.tolist())]).float()
        (SCALE * last.tanh().square().mean()).backward()  # fp16 needs a scale
        # Copies: `cuda` below moves the gradients of the model, too.
        gradients = {
            name: value.grad.float().cpu().clone() for name, value in model.named_parameters() if value.grad is not None
        }
        return {"hidden states": last.detach().cpu(), **gradients}

    expected = computed(waveforms)
    model.cuda().to(dtype)
    for name, found in computed(waveforms.cuda()).items():
        if not name.endswith("k_proj.bias"):  # whose gradient is 0: it adds the same to all scores of a frame
            assert (found - expected[name]).norm() < ERRORS[dtype] * expected[name].norm(), name
