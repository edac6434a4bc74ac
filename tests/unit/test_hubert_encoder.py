"""The encoder against fairseq's own HubertModel."""

import pytest
import torch
from conftest import TINY, stock_hubert
from fairseq.data import Dictionary

from fairseq_stack.models.waveform_norm import normalize_waveforms
from fairseq_stack.teachers.fairseq_checkpoint import FairseqTeacher

SHAPES = {
    "base": dict(TINY),
    "large": {**TINY, "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True},
    "no projection": {**TINY, "encoder_embed_dim": 8},
}
LENGTHS = [400, 401, 719, 720, 4321, 16_000]


def reference_states(model, waveform):
    """Every hidden state of one utterance in fairseq's own forward pass."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: states.append((inputs[0], output[0])))
        for layer in model.encoder.layers
    ]
    with torch.no_grad():
        final, _ = model.extract_features(waveform[None])
    for hook in hooks:
        hook.remove()
    frames = final.size(1)
    outputs = [output.transpose(0, 1)[0, :frames] for _, output in states]
    return [states[0][0].transpose(0, 1)[0, :frames], *outputs[:-1], final[0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_hidden_state_is_fairseqs_alone_and_in_a_padded_batch(shape, normalize):
    model, cfg = stock_hubert(**SHAPES[shape])
    teacher = FairseqTeacher("random", cfg["model"], normalize, model.state_dict())
    generator = torch.Generator().manual_seed(1)
    waveforms = [torch.randn(length, generator=generator) for length in LENGTHS]
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    layers = range(13)
    together = teacher.hidden_states(batch, torch.tensor(LENGTHS), layers)
    for row, waveform in enumerate(waveforms):
        given = torch.nn.functional.layer_norm(waveform, waveform.shape) if normalize else waveform
        expected = reference_states(model, given)
        alone = teacher.hidden_states(waveform[None], torch.tensor([len(waveform)]), layers)
        frames = teacher.frames(len(waveform))
        for layer in layers:
            assert len(expected[layer]) == frames
            torch.testing.assert_close(alone[layer][0], expected[layer], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(together[layer][row, :frames], expected[layer], atol=2e-5, rtol=1e-4)


def test_only_the_layers_up_to_the_highest_target_run():
    model, cfg = stock_hubert(**TINY)
    teacher = FairseqTeacher("random", cfg["model"], False, model.state_dict())
    ran = []
    for number, layer in enumerate(teacher.model.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = teacher.hidden_states(torch.randn(1, 4000), torch.tensor([4000]), [2, 5])
    assert ran == [1, 2, 3, 4, 5] and set(states) == {2, 5}


def test_the_teacher_stays_frozen_and_in_eval_mode():
    model, cfg = stock_hubert(**{**TINY, "dropout": 0.5})
    teacher = FairseqTeacher("random", cfg["model"], False, model.state_dict())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    waveforms, lengths = torch.randn(1, 4000), torch.tensor([4000])
    first, second = (teacher.hidden_states(waveforms, lengths, [12])[12] for _ in range(2))
    assert torch.equal(first, second)


def test_normalised_waveforms_have_mean_0_and_variance_1_over_their_own_samples():
    waveforms = torch.zeros(2, 1000)
    waveforms[0] = torch.randn(1000) * 3 + 1
    waveforms[1, :500] = torch.randn(500) * 0.1 - 2
    normed = normalize_waveforms(waveforms, torch.tensor([1000, 500]))
    for row, length in ((0, 1000), (1, 500)):
        expected = torch.nn.functional.layer_norm(waveforms[row, :length], (length,))
        torch.testing.assert_close(normed[row, :length], expected)
    assert not normed[1, 500:].any()


def test_a_hubert_base_teacher_has_the_published_size():
    classes = Dictionary()
    for cluster in range(500):
        classes.add_symbol(str(cluster))
    model, cfg = stock_hubert(dictionary=classes, final_dim=256)
    count = sum(parameter.numel() for parameter in model.parameters())
    # SUPERB's table says 94.68 M; fairseq's HubertModel with 500 clusters and 4 special symbols has 94,697,600.
    assert count == 94_697_600 and abs(count - 94.68e6) < 0.02e6
    teacher = FairseqTeacher("random", cfg["model"], False, model.state_dict())
    heads = 768 * 256 + 256 + 504 * 256 + 768  # final_proj, label embeddings, mask embedding
    assert sum(parameter.numel() for parameter in teacher.model.parameters()) == count - heads
