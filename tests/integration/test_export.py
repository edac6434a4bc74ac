"""Exports compute what fairseq computes.

The reference is fairseq's own HubertModel with random weights, norms and biases included; this package's
student is not involved. The waveforms are noise: only the arithmetic is compared.
"""

import pytest
import s3prl.hub
import torch
import torch.nn.functional as F
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from transformers import HubertModel as TransformersHubert
from transformers import Wav2Vec2FeatureExtractor

from fairseq_stack.checkpoint import student_from_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.export.huggingface import export_huggingface
from fairseq_stack.export.s3prl import export_s3prl
from fairseq_stack.export.verify import TOLERANCE

CONV = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
# Seats in use at each stage of 12 layers in 4 stages: A1 B1 C1, then A1 A2 B1 B2 C1 C2, and so on.
SEATS = {
    0: [0, 4, 8],
    1: [0, 1, 4, 5, 8, 9],
    2: [0, 1, 2, 4, 5, 6, 8, 9, 10],
    3: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
}
# The shapes of HuBERT Base, of HuBERT Large, and what lies between.
BASE = {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": False}
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
VARIANTS = {
    "base": (BASE, False),
    "base, normalised": (BASE, True),
    "large": (LARGE, True),
    "large, as recorded": (LARGE, False),
    "pre-norm behind a group norm": ({**BASE, "layer_norm_first": True}, False),
    "no projection": ({**BASE, "encoder_embed_dim": 16}, False),
    "tanh approximation of gelu": ({**BASE, "activation_fn": "gelu_accurate"}, False),
}
LENGTHS = (400, 7_777, 16_000, 16_080)  # samples; 1, 24, 49 and 49 frames


def fairseq_hubert(shape):
    """fairseq's HubertModel with 12 random layers."""
    torch.manual_seed(0)
    cfg = HubertConfig(
        label_rate=50.0,
        conv_feature_layers=CONV,
        encoder_layers=12,
        encoder_ffn_embed_dim=48,
        encoder_attention_heads=4,
        conv_pos=16,
        conv_pos_groups=4,
        **{"encoder_embed_dim": 32, **shape},
    )
    model = HubertModel(cfg, HubertPretrainingConfig(), [None]).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                tensor.add_(0.2 * torch.randn_like(tensor))
    return cfg, model


def student_state(shape, stage, normalize):
    """What fairseq would save for a student with these weights, and the model that it should equal."""
    cfg, model = fairseq_hubert(shape)
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("mask_emb", "final_proj"))
    }
    weights["heads.12.weight"] = torch.randn(48, cfg.encoder_embed_dim)
    weights["heads.12.bias"] = torch.randn(48)
    weights["stage"] = torch.tensor(float(stage))
    config = {**vars(cfg), "_name": "stacked_hubert", "stack_method": "interleaved", "stack_stages": 4}
    state = {"model": weights, "cfg": {"model": config, "task": {"normalize": normalize}}}
    model.encoder.layers = torch.nn.ModuleList(model.encoder.layers[seat] for seat in SEATS[stage])
    return state, model


@torch.no_grad()
def fairseq_hidden_states(model, waveform, normalize):
    """Hidden states 0 to D of one waveform [S], the last one behind the final layer norm of a pre-norm model."""
    source = (F.layer_norm(waveform, waveform.shape) if normalize else waveform)[None]
    first = []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda module, args: first.append(args[0]))
    depth = len(model.encoder.layers)
    states = [model.extract_features(source, output_layer=layer)[0] for layer in (*range(1, depth), None)]
    handle.remove()
    return [first[0].transpose(0, 1)[:, : states[0].size(1)], *states]


def waveform(length):
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length))


def difference(states, others):
    assert [state.shape for state in states] == [state.shape for state in others]
    return max((state - other).abs().max().item() for state, other in zip(states, others))


def exported(tmp_path, state):
    student = student_from_checkpoint(state)
    export_huggingface(student, tmp_path / "huggingface")
    export_s3prl(student, tmp_path / "s3prl.pt")
    return tmp_path / "huggingface", tmp_path / "s3prl.pt"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [0, 3])
def test_every_hidden_state_equals_fairseqs(tmp_path, variant, stage):
    shape, normalize = VARIANTS[variant]
    state, model = student_state(shape, stage, normalize)
    folder, file = exported(tmp_path, state)

    transformers_model, report = TransformersHubert.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    upstream = s3prl.hub.hubert_local(ckpt=str(file)).eval()

    for length in LENGTHS:
        expected = fairseq_hidden_states(model, waveform(length), normalize)
        assert len(expected) == len(SEATS[stage]) + 1
        source = waveform(length)
        inputs = F.layer_norm(source, source.shape) if normalize else source
        with torch.no_grad():
            states = transformers_model(inputs[None], output_hidden_states=True).hidden_states
            print(variant, length, "hf", difference(states, expected))
            assert difference(states, expected) < TOLERANCE
            d=difference(upstream([source])["hidden_states"], expected); print("s3", d)
            assert d < TOLERANCE


def test_batches(tmp_path):
    for variant in VARIANTS:
        shape, normalize = VARIANTS[variant]
        state, model = student_state(shape, 1, normalize)
        (tmp_path/variant).mkdir()
        folder, file = exported(tmp_path/variant, state)
        up = s3prl.hub.hubert_local(ckpt=str(file)).eval()
        hf = s3prl.hub.hf_hubert_custom(str(folder)).eval()
        m = TransformersHubert.from_pretrained(folder)
        fe = Wav2Vec2FeatureExtractor.from_pretrained(folder)
        ws = [waveform(l) for l in (7777, 16000, 12345)]
        for k, w in enumerate(ws):
            e = fairseq_hidden_states(model, w, normalize)
            T = e[0].size(1)
            with torch.no_grad():
                nomask = fe([w.numpy() for w in ws], return_tensors="pt", padding=True, return_attention_mask=False, sampling_rate=16000)
                print(variant, len(w), "hf1", difference(hf([w])["hidden_states"], e), "s3prlbatch", difference([s[k:k+1,:T] for s in up(ws)["hidden_states"]], e),
                 "hfbatch", difference([s[k:k+1,:T] for s in hf(ws)["hidden_states"]], e), "nomask", difference([s[k:k+1,:T] for s in m(**nomask, output_hidden_states=True).hidden_states], e))
