"""Students that start from weights of their teacher, a HuBERT of fairseq's own with random weights."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import LINKED, TINY, stock_hubert
from omegaconf import OmegaConf

from fairseq_stack.errors import InputError
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.fairseq_checkpoint import FairseqTeacher

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
WAVEFORMS = torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))
LENGTHS = torch.tensor([4000, 3000])


@pytest.fixture(scope="module")
def teacher():
    model, cfg = stock_hubert(seed=5, **TINY)
    return FairseqTeacher("teacher.pt", cfg["model"], False, model.state_dict())


def student(teacher, **fields):
    torch.manual_seed(0)
    cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), LINKED, {**TINY, **NO_DROPOUT, **fields})
    return StackedHubert.build_model(cfg, SimpleNamespace(teacher=teacher))


def same(ours, theirs):
    """Which entries of two modules' state dicts are equal."""
    theirs = theirs.state_dict()
    return {key for key, value in ours.state_dict().items() if torch.equal(value, theirs[key])}


def test_a_student_with_all_of_the_teachers_weights_gives_its_hidden_states(teacher):
    model = student(
        teacher,
        init_cnn_from_teacher=True,
        init_layers_from_teacher=list(range(1, 13)),
        stack_method="none",
        stack_stages=1,
    ).eval()
    with torch.no_grad():
        ours, frames = model.hidden_states(WAVEFORMS, LENGTHS)
    theirs = teacher.hidden_states(WAVEFORMS, LENGTHS, range(1, 13))
    for layer in range(1, 13):
        for row in range(2):
            torch.testing.assert_close(ours[layer][row, : frames[row]], theirs[layer][row, : frames[row]])


def test_the_first_stages_seats_start_from_the_chosen_layers(teacher):
    model = student(teacher, init_layers_from_teacher=[2, 6, 10])
    assert model.depth == 3
    for seat, layer in zip(model.seats, (2, 6, 10)):
        ours, theirs = model.encoder.layers[seat], teacher.model.encoder.layers[layer - 1]
        assert same(ours, theirs) == set(ours.state_dict())
    assert "0.weight_v" in same(model.encoder.pos_conv, teacher.model.encoder.pos_conv)
    assert "conv_layers.0.0.weight" not in same(model.feature_extractor, teacher.model.feature_extractor)


@pytest.mark.parametrize("width", [16, 24])
def test_the_cnn_starts_from_the_teachers_and_its_projection_where_the_widths_agree(teacher, width):
    model = student(teacher, init_cnn_from_teacher=True, encoder_embed_dim=width)
    cnn = model.feature_extractor
    assert same(cnn, teacher.model.feature_extractor) == set(cnn.state_dict())
    ours, theirs = model.post_extract_proj.weight, teacher.model.post_extract_proj.weight
    assert (ours.shape == theirs.shape and torch.equal(ours, theirs)) == (width == 16)
    unchanged = student(teacher, encoder_embed_dim=width)
    assert "layers.0.fc1.weight" in same(model.encoder, unchanged.encoder)


def test_the_student_does_not_share_memory_with_the_teacher(teacher):
    model = student(teacher, init_cnn_from_teacher=True, init_layers_from_teacher=[1, 2, 3])
    before = teacher.hidden_states(WAVEFORMS, LENGTHS, [12])[12]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(teacher.hidden_states(WAVEFORMS, LENGTHS, [12])[12], before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"init_layers_from_teacher": [1, 2]}, r"\[1, 2\] names 2 layers, but the student starts with 3"),
        ({"init_layers_from_teacher": [1, 2, 13]}, "13 is no layer of task.teacher=teacher.pt; choose"),
        (
            {"init_layers_from_teacher": [1, 2, 3], "encoder_embed_dim": 24},
            "encoder.pos_conv.0.bias is .24,. in the student and .16,. in task.teacher=teacher.pt",
        ),
        (
            {"init_layers_from_teacher": [1, 2, 3], "layer_norm_first": True},
            "needs model.layer_norm_first=false, as the teacher has it",
        ),
        (
            {"init_cnn_from_teacher": True, "conv_feature_layers": TINY["conv_feature_layers"].replace("8,", "6,")},
            "feature_extractor.conv_layers.0.0.weight is .6, 1, 10. in the student",
        ),
        (
            {"init_cnn_from_teacher": True, "conv_bias": True},
            "conv_layers.0.0.bias is .8,. in the student and missing in",
        ),
    ],
)
def test_a_start_that_does_not_fit_gets_one_line(teacher, fields, message):
    with pytest.raises(InputError, match=message) as error:
        student(teacher, **fields)
    assert "\n" not in str(error.value)


def test_a_teacher_of_another_kind_gets_one_line(tmp_path):
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=12, encoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32,
        vocab_size=5, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.WhisperModel(config).encoder.save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    for fields in ({"init_cnn_from_teacher": True}, {"init_layers_from_teacher": [1, 2, 3]}):
        with pytest.raises(InputError, match="needs a teacher from a checkpoint of fairseq"):
            student(load_teacher(tmp_path), **fields)
