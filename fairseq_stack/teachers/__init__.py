"""Foundation models to learn from, behind one small interface (`base.Teacher`)."""

from pathlib import Path

import torch

from fairseq_stack.errors import InputError
from fairseq_stack.teachers.base import PRECISIONS

__all__ = ["load_teacher"]


def load_teacher(path, whisper_pad=False, precision="fp32"):
    """Load a teacher: a file is a fairseq checkpoint, a folder is in Hugging Face's format.

    Args:
        path: fairseq checkpoint of a hubert, wav2vec2 or data2vec_audio, or a folder that
            transformers' save_pretrained wrote of a HubertModel, Wav2Vec2Model, WavLMModel,
            Data2VecAudioModel or WhisperModel (or WhisperEncoder).
        whisper_pad: give Whisper its recordings padded to 30 s, as in its pre-training.
        precision: fp32, fp16 or bf16, of its weights and hidden states.

    Raises:
        InputError: no such teacher, or one that cannot be loaded without running code from it.
    """
    # A network is made with random weights first. A student must start and train with the same random numbers
    # whenever its teacher is loaded, and where its targets are stored that may be never.
    with torch.random.fork_rng(devices=[]):
        teacher = _load(Path(path), whisper_pad)
    teacher.model.to(PRECISIONS[precision])
    return teacher


def _load(path, whisper_pad):
    # Each of the two imports takes seconds; a run needs one of them.
    if path.is_dir():
        from fairseq_stack.teachers.huggingface import load_huggingface_teacher

        return load_huggingface_teacher(path, whisper_pad)
    if not path.is_file():
        raise InputError(
            f"task.teacher={path} does not exist; give a fairseq checkpoint or a folder in Hugging"
            " Face's format"
        )
    from fairseq_stack.teachers.fairseq_checkpoint import load_fairseq_teacher

    if whisper_pad:
        raise InputError(f"task.whisper_pad=true, but task.teacher={path} is no Whisper; set it to false")
    return load_fairseq_teacher(path)
