"""On a GPU, the CNN's gradients are the CPU's and need few launches."""

import pytest
import torch

from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.models.conv_extractor import ConvExtractor

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that does not ask CUDA's driver, newer than 2.4")


@pytest.mark.parametrize("mode, bias", [("default", False), ("default", True), ("layer_norm", True)])
def test_features_and_gradients_are_the_cpus(mode, bias):
    torch.manual_seed(0)
    cnn = ConvExtractor([(16, 10, 5), (24, 3, 2), (16, 2, 2)], mode, bias)
    waveforms, lengths = torch.randn(5, 900), torch.tensor([900, 700, 900, 500, 900])
    cnn(waveforms, lengths).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in cnn.named_parameters() if parameter.grad is not None}
    cnn.zero_grad()
    with pretended_gpu() as machine:
        features = cnn.cuda()(waveforms.cuda(), lengths.cuda())
        forward = machine.launches.total()
        features.square().mean().backward()
        assert machine.launches.total() - forward < 60  # a loop over the utterances makes 70
        for name, parameter in cnn.named_parameters():
            if name in expected:
                scale = expected[name].abs().max().item()
                torch.testing.assert_close(parameter.grad.cpu(), expected[name], rtol=0, atol=1e-4 * scale, msg=name)
