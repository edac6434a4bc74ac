"""Foundation models to learn from, behind one small interface (`base.Teacher`)."""

from pathlib import Path

import torch

from fairseq_stack.checkpoints.read import read_torch_file
from fairseq_stack.errors import InputError
from fairseq_stack.teachers.base import PRECISIONS
from fairseq_stack.teachers.layouts import teacher_of

__all__ = ["load_teacher"]

# Ends of names in the state dicts of transformers.
TRANSFORMERS = ("feature_projection.projection.weight", "encoder.embed_positions.weight")


def load_teacher(path, whisper_pad=False, precision="fp32"):
    """Load a teacher: a file of torch.save's, or a folder in Hugging Face's format.

    Args:
        path: a file that fairseq, Microsoft (of WavLM), ContentVec's authors, torchaudio, s3prl or a training of
            this package wrote, with fairseq_checkpoint's FAMILIES or a fine-tuned model of them; or a folder in
            Hugging Face's format, with one of huggingface's FAMILIES, under a head or not.
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
    if path.is_dir():  # transformers takes seconds to import
        from fairseq_stack.teachers.huggingface import load_huggingface_teacher

        return load_huggingface_teacher(path, whisper_pad)
    if not path.is_file():
        raise InputError(
            f"task.teacher={path} does not exist; give a fairseq checkpoint or a folder in Hugging Face's format (of a model"
            " on its hub, hf download NAME --local-dir FOLDER makes one)"
        )
    if path.suffix in (".json", ".safetensors", ".bin", ".h5", ".msgpack") and (path.parent / "config.json").is_file():
        raise InputError(f"task.teacher={path} is one file of a folder in Hugging Face's format; give {path.parent}")
    if whisper_pad:
        raise InputError(f"task.whisper_pad=true, but task.teacher={path} is no Whisper; set it to false")
    return _load_file(path)


def _load_file(path):
    name, alone = str(path), path.suffix in (".safetensors", ".onnx")
    content = {} if alone else read_torch_file(path)
    if not isinstance(content, dict):
        content = {}
    teacher = None if alone else teacher_of(content, name)
    if teacher is not None:
        return teacher
    if alone or any(str(key).endswith(TRANSFORMERS) for key in content):
        raise InputError(
            f"task.teacher={name} has weights and nothing that says what model they belong to; give the folder in"
            " Hugging Face's format, with config.json, or the checkpoint that it was made from"
        )
    if "model_state_dict" in content:
        raise InputError(
            f"task.teacher={name} is in OpenAI's own format of Whisper; give the folder of the same model in Hugging"
            " Face's format, such as openai/whisper-base"
        )
    raise InputError(
        f"task.teacher={name} holds no model that is known here; give a checkpoint of fairseq, s3prl or torchaudio,"
        " or a folder in Hugging Face's format"
    )
