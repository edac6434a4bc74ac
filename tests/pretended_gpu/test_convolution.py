"""On a GPU, convolutions give the CPU's values, and the CNN's gradients need few launches."""

import pytest
import torch
import transformers

from fairseq_stack.benchmark.pretended_gpu import AVAILABLE, pretended_gpu
from fairseq_stack.models.conv_extractor import ConvExtractor
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.teachers.huggingface import HuggingFaceTeacher

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


@pytest.mark.parametrize("model", [transformers.WavLMModel, transformers.Data2VecAudioModel])
def test_hidden_states_of_transformers_models_are_the_cpus(model):
    config = model.config_class(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=5, num_conv_pos_embedding_groups=4, conv_pos_kernel_size=5,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = HuggingFaceTeacher("folder", model.__name__, model(config).eval(), normalize=False)
    waveforms, lengths = torch.randn(2, 9000), torch.tensor([9000, 7000])
    expected = teacher.hidden_states(waveforms, lengths, (0, 1, 2))
    with pretended_gpu():
        found = teacher.hidden_states(waveforms.cuda(), lengths, (0, 1, 2))
        for layer, states in expected.items():
            assert found[layer].is_cuda
            for row, frames in enumerate(frames_from_samples(lengths, teacher.conv_layers)):
                torch.testing.assert_close(found[layer][row, :frames].cpu(), states[row, :frames], rtol=1e-3, atol=1e-4)
