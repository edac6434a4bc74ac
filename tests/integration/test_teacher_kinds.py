"""Training with teachers in Hugging Face's format, and of students that start from their teacher.

transformers' real models with random weights, in tiny sizes.
"""

import pytest
import torch
import transformers
from training import tiny, train


def wavlm(folder):
    config = transformers.WavLMConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=4, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.WavLMModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


def whisper(folder):
    config = transformers.WhisperConfig(
        d_model=24, encoder_layers=12, encoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32,
        vocab_size=5, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)


@pytest.mark.parametrize("make", [wavlm, whisper])
def test_a_student_of_a_folder_grows_to_its_full_depth(make, speech, tmp_path):
    make(tmp_path / "teacher")
    trainer = train("librispeech_base", tiny(speech, tmp_path / "teacher", tmp_path))
    assert trainer.get_num_updates() == 20 and trainer.model.depth == 12
    state = torch.load(tmp_path / "checkpoints/checkpoint_last.pt", weights_only=True)
    assert state["model"]["heads.4.weight"].size(0) == trainer.task.teacher.width
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_student_trains_from_its_teachers_cnn_and_layers(speech, teacher_file, tmp_path):
    start = {
        "+model.init_cnn_from_teacher": True,
        "+model.init_layers_from_teacher": "[1,2,3]",
        "+model.feature_grad_mult": 0.0,
        "optimizer.weight_decay": 0.0,
        "optimization.max_update": 10,
    }
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **start))
    ours, theirs = trainer.model.state_dict(), trainer.task.teacher.model.state_dict()
    kept = {name for name in theirs if name in ours and torch.equal(ours[name], theirs[name])}
    frozen = {name for name in theirs if name.startswith("feature_extractor.")}
    assert kept >= frozen  # feature_grad_mult 0: the CNN is still the teacher's
    assert "encoder.layers.0.fc1.weight" not in kept  # the layers learn
    # They started from the teacher's layer, and ten updates do not lead far away.
    moved = (ours["encoder.layers.0.fc1.weight"] - theirs["encoder.layers.0.fc1.weight"]).abs().max()
    assert 0 < moved < 0.01
