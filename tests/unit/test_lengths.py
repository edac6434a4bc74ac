"""Frame counts against real convolutions, and fairseq's layer strings without running them."""

import pytest
import torch
from torch import nn

from fairseq_stack.models.conv_geometry import (
    frames_from_samples,
    parse_conv_layers,
    receptive_field,
    samples_per_frame,
)

HUBERT = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def convolutions(layers):
    """Unpadded convolutions of one channel with these kernels and strides."""
    return nn.Sequential(*(nn.Conv1d(1, 1, kernel, stride) for _, kernel, stride in layers))


@torch.no_grad()
@pytest.mark.parametrize("text", [HUBERT, "[(8,3,2), (8,2,1)]", "[(8,1,1)]", "[(8,2,5)]"])
def test_frame_counts_are_those_of_real_convolutions(text):
    layers = parse_conv_layers(text)
    extractor = convolutions(layers)
    shortest = receptive_field(layers)
    with pytest.raises(RuntimeError):
        extractor(torch.zeros(1, 1, shortest - 1))
    counted = frames_from_samples(torch.arange(1, 2001), layers)
    assert (counted[: shortest - 1] <= 0).all()
    for samples in range(shortest, 2001):
        frames = extractor(torch.zeros(1, 1, samples)).shape[-1]
        assert frames_from_samples(samples, layers) == frames
        assert counted[samples - 1] == frames


def test_hubert_makes_49_frames_a_second_of_25_ms_every_20_ms():
    layers = parse_conv_layers(HUBERT)
    assert frames_from_samples(16_000, layers) == 49
    assert receptive_field(layers) == 400
    assert samples_per_frame(layers) == 320


@torch.no_grad()
def test_one_frame_sees_its_receptive_field_and_the_next_is_one_hop_later():
    layers = parse_conv_layers("[(8,10,5)] + [(8,3,2)] * 2")
    extractor = convolutions(layers)
    for layer in extractor:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    samples = torch.zeros(1, 1, 200, requires_grad=True)
    with torch.enable_grad():
        frames = extractor(samples)[0, 0]
        gradients = [torch.autograd.grad(frame, samples, retain_graph=True)[0] for frame in frames[:2]]
    seen = [gradient.nonzero()[:, 2] for gradient in gradients]
    assert (seen[0].min(), seen[0].max()) == (0, receptive_field(layers) - 1)
    assert seen[1].min() == samples_per_frame(layers)


def test_layer_strings_mean_what_fairseq_makes_of_them():
    # Strings as they stand in fairseq's wav2vec 2.0 and HuBERT configurations, and what Python makes of them.
    assert parse_conv_layers(HUBERT) == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]") == (
        [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    )
    assert parse_conv_layers(" [(16,10,5),(16,3,2)]\n") == [(16, 10, 5), (16, 3, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').abort()",
        "[(512,10,5)] + exit()",
        "[(512,10,5) for _ in range(2)]",
        "[(512,10,5)] * 10**9",
        "[(512,10,5)] * 101",
        "[(512,10,5)] * -1",
        "[[(512,10,5)] * 100] * 100",
        "[(512,10,5)] * 100 * 100 * 100 * 100",
        "[(512,10)]",
        "[(512,10,0)]",
        "[(512,10,5.0)]",
        "[(512,True,5)]",
        "[('a',10,5)]",
        "[(512,[10],5)]",
        "(512,10,5)",
        "(512,10) + (5,)",
        "[]",
        "",
        "512",
        "[(512,10,5)",
        "[(512,10,5)]; x = 1",
        "[" * 500 + "]" * 500,
        "[(512,10,5)]" + " + [(512,10,5)]" * 20_000,
        "[(512,10,5)]\0",
    ],
)
def test_anything_but_a_list_of_three_positive_integers_each_is_refused(text):
    with pytest.raises(ValueError):
        parse_conv_layers(text)
