"""What was made faster computes what fairseq's modules and torch's compute, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import (
    ConvFeatureExtractionModel,
    TransformerEncoder,
    TransformerSentenceEncoderLayer,
    Wav2Vec2Config,
)

from fairseq_stack.models.conv_extractor import ConvExtractor
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.models.dropout import dropout, kept, masked
from fairseq_stack.models.layer_stack import EncoderLayer, attention
from fairseq_stack.models.pos_conv import blockwise_convolution, positions, smooth_size

SHAPES = [(16, 10, 5), (16, 3, 2), (24, 3, 2), (24, 2, 2)]
CNNS = [("default", False), ("default", True), ("layer_norm", True), ("layer_norm", False)]


def gradients(output, module):
    """Gradient of a fixed weighting of `output` with respect to each parameter."""
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape).type_as(output)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found)
    }


def assert_same_gradients(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name in found:
        scale = expected[name].abs().max().clamp(min=1e-2).item()
        torch.testing.assert_close(found[name].to(expected[name]), expected[name], rtol=0, atol=tolerance * scale)


def cnns(mode, bias):
    """The same random CNN as ours in fp32 and as fairseq's in float64."""
    torch.manual_seed(0)
    ours = ConvExtractor(SHAPES, mode, bias)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = ConvFeatureExtractionModel(SHAPES, mode=mode, conv_bias=bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


def in_float64(module):
    """fairseq's norms compute in fp32 whatever they are given; the reference is to be exact."""
    for norm in module.modules():
        if isinstance(norm, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            norm.forward = super(type(norm), norm).forward
    return module


@pytest.mark.parametrize("mode, bias", CNNS)
def test_the_cnn_gives_fairseqs_features_and_gradients(mode, bias):
    ours, theirs = cnns(mode, bias)
    in_float64(theirs)
    waveforms = torch.randn(3, 1500)
    features = ours(waveforms, torch.full((3,), 1500))
    expected = theirs(waveforms.double())
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(features, ours), gradients(expected, theirs))


@pytest.mark.parametrize("mode, bias", CNNS)
def test_an_utterance_has_the_same_features_and_gradients_alone_and_in_a_padded_batch(mode, bias):
    ours, _ = cnns(mode, bias)
    long, short = torch.randn(1500), torch.randn(700)
    batch = torch.nn.utils.rnn.pad_sequence([long, short], batch_first=True)
    together = ours(batch, torch.tensor([1500, 700]))[1:, :, : frames_from_samples(700, SHAPES)]
    alone = ours(short[None], torch.tensor([700]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(together, ours), gradients(alone, ours))


def test_the_group_norm_is_exact_where_a_kernel_hears_a_band_without_energy():
    ours, theirs = cnns("default", False)
    in_float64(theirs)
    time = torch.arange(4000) / 16_000
    hum = torch.sin(2 * torch.pi * 50 * time) + 1e-3 * torch.randn(4000)
    with torch.no_grad():  # second differences, which take a hum of 50 Hz away almost completely
        for module in (ours, theirs):
            module.conv_layers[0][0].weight[0, 0] = torch.tensor([1, -2, 1, 0, 0, 0, 0, 0, 0, 0.0])
        features = ours(hum[None], torch.tensor([4000]))
        torch.testing.assert_close(features.double(), theirs(hum[None].double()), rtol=1e-3, atol=1e-3)


def test_the_group_norm_is_exact_for_a_quiet_recording_with_an_offset():
    ours, theirs = cnns("default", False)
    quiet = 1e-3 * torch.randn(4000) + 0.1
    with torch.no_grad():
        features = ours(quiet[None], torch.tensor([4000]))
        expected = in_float64(theirs)(quiet[None].double())
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_cnn_in_bf16_is_as_near_to_float64_as_fairseqs_in_bf16():
    ours, exact = cnns("default", False)
    waveforms = torch.randn(2, 3000).bfloat16()
    theirs = ConvFeatureExtractionModel(SHAPES, mode="default", conv_bias=False)
    theirs.load_state_dict(ours.state_dict())
    expected = in_float64(exact)(waveforms.double())
    our_error = (ours.bfloat16()(waveforms, torch.full((2,), 3000)).double() - expected).norm()
    assert our_error < 1.5 * (theirs.bfloat16()(waveforms).double() - expected).norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_layer_norms_of_the_cnn_in_bf16_keep_no_copy_in_fp32_and_are_as_exact_as_fairseqs(autocast):
    ours, exact = cnns("layer_norm", True)
    waveforms = torch.randn(2, 3000)
    expected = in_float64(exact)(waveforms.double())
    theirs = ConvFeatureExtractionModel(SHAPES, mode="layer_norm", conv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    if not autocast:
        ours, theirs, waveforms = ours.bfloat16(), theirs.bfloat16(), waveforms.bfloat16()
    kept = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            output = ours(waveforms, torch.full((2,), 3000))
        reference = theirs(waveforms)
    last = output.numel()  # the smallest of the features; a norm's mean and deviation are smaller
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and tensor.numel() >= last]
    assert (output.double() - expected).norm() < 1.5 * (reference.double() - expected).norm()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_gives_fairseqs_output_and_gradients(norm_first, padded):
    torch.manual_seed(0)
    shape = dict(embedding_dim=24, ffn_embedding_dim=48, num_attention_heads=4, dropout=0.0, attention_dropout=0.0,
                 activation_dropout=0.0, activation_fn="gelu", layer_norm_first=norm_first)  # fmt: skip
    ours, theirs = EncoderLayer(**shape), TransformerSentenceEncoderLayer(**shape)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 11, 24)
    padding = torch.arange(11) >= torch.tensor([[11], [7]]) if padded else None
    output = ours(x, padding)
    expected = theirs(x.transpose(0, 1), self_attn_padding_mask=padding)[0].transpose(0, 1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(output, ours), gradients(expected, theirs))


def test_attention_drops_weights_only_in_training():
    torch.manual_seed(0)
    layer = EncoderLayer(24, 48, 4, dropout=0.0, attention_dropout=0.5, activation_dropout=0.0, activation_fn="gelu")
    x = torch.randn(1, 50, 24)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("depth", [1, 3], ids=["HuBERT", "data2vec"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_positional_convolution_is_fairseqs(depth, trained):
    torch.manual_seed(0)
    shape = Wav2Vec2Config(encoder_layers=0, encoder_embed_dim=16, conv_pos=32, conv_pos_groups=4, pos_conv_depth=depth)
    ours, theirs = TransformerEncoder(shape).pos_conv, TransformerEncoder(shape).pos_conv
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 45, 16)
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    if trained:
        output = positions(ours, x, None)
        assert_same_gradients(gradients(output, ours), gradients(expected, theirs))
    else:
        output = positions(ours.requires_grad_(False), x, None)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames, groups, taps", [(1, 4, 32), (15, 16, 5), (16, 2, 1), (45, 4, 32), (200, 4, 128)])
def test_the_positional_convolution_of_a_gpu_is_torchs(frames, groups, taps):
    torch.manual_seed(0)
    x = torch.randn(3, frames, 16, dtype=torch.double, requires_grad=True)
    weight = torch.randn(16, 16 // groups, taps, dtype=torch.double, requires_grad=True)
    found = blockwise_convolution(x, weight, taps // 2, groups)
    expected = F.conv1d(x.transpose(1, 2), weight, None, 1, taps // 2, 1, groups).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_sizes_of_fourier_transforms_are_products_of_small_primes():
    assert [smooth_size(size) for size in (1, 7, 11, 25, 31, 527, 907)] == [1, 8, 12, 25, 32, 540, 960]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    x = torch.ones(101, 1003, requires_grad=True)
    output = dropout(x, probability, training=True)
    dropped = (output == 0).float()
    # Five standard deviations of a share; neighbours, which come from one random number, are independent too.
    sure = 5 * (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(dropped.mean().item() - probability) < sure
    assert abs((dropped[:, 1:] * dropped[:, :-1]).mean().item() - probability**2) < sure
    torch.testing.assert_close(output.max().item(), 1 / (1 - probability), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, output)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, probability, training=True), output)
    assert dropout(x, probability, training=False) is x and dropout(x, 0.0, training=True) is x
    assert torch.equal(dropout(x, 1.0, training=True), torch.zeros_like(x))


def test_attention_with_dropout_is_that_of_its_mask():
    shape = (2, 3, 7, 4)
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    padding = torch.arange(7) >= torch.tensor([[7], [5]])
    torch.manual_seed(1)
    output = attention(query, key, value, padding, 0.3)
    torch.manual_seed(1)
    keep, scale = kept((2, 3, 7, 7), 0.3)
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (query, key, value))
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(padding[:, None, None], float("-inf"))
    expected = (scores.softmax(3) * keep * scale) @ v
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (q, k, v), upstream.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert keep.float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_mask_keeps_numbers_of_each_type_as_they_are(dtype):
    x, (keep, _) = torch.randn(5, 7, 11).to(dtype).transpose(0, 1), kept((7, 5, 11), 0.3)
    assert keep.unique().tolist() == [0, 1]
    expected = torch.where(keep == 1, x, torch.zeros((), dtype=dtype))
    assert torch.equal(masked(x, keep).abs(), expected.abs()) and masked(x, keep).dtype == dtype
    assert masked(x, keep, out=x) is x and torch.equal(x, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_attention_in_bf16_is_that_in_fp32_and_keeps_one_tensor_of_the_scores_and_a_mask(probability):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 40, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    padding = torch.arange(40) >= torch.tensor([[29], [40]])
    upstream = torch.randn(2, 3, 40, 8).bfloat16()
    saved, found = [], []
    for inputs in (tensors, exact):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            output = attention(*inputs, padding, probability)
        found.append([output, *torch.autograd.grad(output, inputs, upstream.to(output))])
        if inputs is tensors:
            large = [x for x in saved if x.numel() > tensors[0].numel()]
            assert sum(x.numel() for x in large) <= (1 + (probability > 0)) * 2 * 3 * 40 * 40
            assert all(x.element_size() == 2 for x in large)
    for ours, theirs in zip(*found):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()
    assert not found[0][2][0, :, 29:].any() and not found[0][3][0, :, 29:].any()  # no gradient from padding


@pytest.mark.parametrize("width", [64, 128, 384])
@pytest.mark.parametrize("trained", [True, False])
def test_the_positional_convolution_is_right_in_bf16(width, trained):
    torch.manual_seed(0)
    shape = Wav2Vec2Config(encoder_layers=0, encoder_embed_dim=width, conv_pos=128, conv_pos_groups=16)
    module = TransformerEncoder(shape).pos_conv.bfloat16().requires_grad_(trained)
    x = torch.randn(2, 99, width).bfloat16()
    conv = module[0]
    weight = torch._weight_norm(conv.weight_v.double(), conv.weight_g.double(), 2)
    expected = F.conv1d(x.double().transpose(1, 2), weight, conv.bias.double(), 1, 64, 1, 16)[..., :99]
    error = positions(module, x, None).double() - F.gelu(expected).transpose(1, 2)
    assert error.square().mean() < 1e-3 * F.gelu(expected).var()
