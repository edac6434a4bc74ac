"""Teachers: foundation models behind one small interface (`base.Teacher`)."""

from pathlib import Path

import torch

from fairseq_stack.checkpoints.read import read_torch_file
from fairseq_stack.errors import InputError
from fairseq_stack.teachers.base import PRECISIONS, Teacher
from fairseq_stack.teachers.layouts import teacher_of

__all__ = ["load_teacher"]

# Endings of weights' names in state dicts of transformers.
TRANSFORMERS = ("feature_projection.projection.weight", "encoder.embed_positions.weight")


def load_teacher(path: str | Path, whisper_pad: bool = False, precision: str = "fp32") -> Teacher:
    """Load a teacher from a file that torch.save wrote, or from a folder in Hugging Face's format.

    Args:
        path: a file from fairseq, Microsoft (WavLM), ContentVec's authors, torchaudio, s3prl or a training of this
            package. It holds a model of fairseq_checkpoint's FAMILIES, possibly fine-tuned. Or a folder in Hugging
            Face's format, with one of huggingface's FAMILIES, with or without a head.
        whisper_pad: pad Whisper's recordings to 30 s, as in its pre-training.
        precision: of its weights and hidden states: fp32, fp16 or bf16.

    Raises:
        InputError: the file or folder does not exist, is damaged, holds no known model, or would run its own code.
    """
    # A new network draws random weights. A student must start and train with the same random numbers whenever its
    # teacher is loaded; with stored targets the teacher may never be loaded.
    with torch.random.fork_rng(devices=[]):
        teacher = _load(Path(path), whisper_pad)
    teacher.model.to(PRECISIONS[precision])
    return teacher


def _load(path: Path, whisper_pad: bool) -> Teacher:
    if path.is_dir():  # transformers takes seconds to import
        from fairseq_stack.teachers.huggingface import load_huggingface_teacher

        return load_huggingface_teacher(path, whisper_pad)
    if not path.is_file():
        raise InputError(
            f"task.teacher={path} does not exist; give a fairseq checkpoint or a folder in Hugging Face's format (of a"
            " model on its hub, hf download NAME --local-dir FOLDER makes one)"
        )
    if path.suffix in (".json", ".safetensors", ".bin", ".h5", ".msgpack") and (path.parent / "config.json").is_file():
        raise InputError(f"task.teacher={path} is one file of a folder in Hugging Face's format; give {path.parent}")
    if whisper_pad:
        raise InputError(f"task.whisper_pad=true, but task.teacher={path} is no Whisper; set it to false")
    return _load_file(path)


def _load_file(path: Path) -> Teacher:
    name, weights_alone = str(path), path.suffix in (".safetensors", ".onnx")
    content = {} if weights_alone else read_torch_file(path)
    if not isinstance(content, dict):
        content = {}
    teacher = None if weights_alone else teacher_of(content, name)
    if teacher is not None:
        return teacher
    if weights_alone or any(str(key).endswith(TRANSFORMERS) for key in content):
        raise InputError(
            f"task.teacher={name} has weights but no configuration of their model; give the folder in"
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
