"""The layouts of files in which teachers are published.

A model of the HuBERT family is read as an `Encoder` with fairseq's names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fairseq_stack.checkpoints.read import configurations, load_checkpoint
from fairseq_stack.checkpoints.stand_ins import plain
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.errors import InputError
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON
from fairseq_stack.teachers.base import Teacher
from fairseq_stack.teachers.families import LAYOUTS

# fairseq's names of models that are fine-tuned for recognition, and the prefixes of their encoders' weights.
FINE_TUNED = ("wav2vec_ctc", "wav2vec_seq2seq", "hubert_ctc", "hubert_seq2seq")
TORCHAUDIO = "encoder.feature_projection.projection.weight"  # ending of a name in its state dicts
ENCODER_PREFIXES = ("w2v_encoder.w2v_model.", "encoder.w2v_model.")


class Encoder(NamedTuple):
    """An encoder as a file describes it.

    Attributes:
        config: fairseq's fields of the model; `_name` is its family.
        normalize: whether it was trained on waveforms of zero mean and unit variance.
        weights: {fairseq's name: tensor}, including those that only its training needs.
        epsilon: the number that its training added to the variance of a waveform.
    """

    config: Mapping[str, Any]
    normalize: bool
    weights: Mapping[str, Tensor]
    epsilon: float = FAIRSEQ_EPSILON


def teacher_of(content: dict, name: str) -> Teacher | None:
    """Return the Teacher in a file, or None if no layout recognizes the file.

    Args:
        content: the dict that read_torch_file has read.
        name: the teacher's name in errors.

    Raises:
        InputError: a part is missing or of another type, or the model is of no known family.
    """
    layout = next((layout for layout in reversed(list(LAYOUTS.values())) if layout.recognizes(content)), None)
    found = None if layout is None else layout.load(content, name)
    return _of_encoder(found, name) if isinstance(found, Encoder) else found


def _of_encoder(encoder: Encoder, name: str) -> Teacher:
    if not isinstance(encoder.config.get("_name"), str):
        raise InputError(f"task.teacher={name} does not say in its configuration which model it is; get the file again")
    if not isinstance(encoder.normalize, bool):
        raise InputError(
            f"task.teacher={name} has task.normalize={encoder.normalize}, neither true nor false; it is damaged"
        )
    # Imported here because transformers takes seconds, and so do fairseq's models; a run needs only one of them.
    if encoder.config["_name"] == "wavlm":
        from fairseq_stack.teachers.wavlm import wavlm_teacher

        return wavlm_teacher(name, *encoder)
    from fairseq_stack.teachers.fairseq_checkpoint import FairseqTeacher

    return FairseqTeacher(name, *encoder)


def _has(part: str) -> Callable[[dict], bool]:
    return lambda content: isinstance(content.get(part), dict)


@LAYOUTS.register("torchaudio", recognizes=lambda content: any(str(key).endswith(TORCHAUDIO) for key in content))
def _torchaudio(content: dict, name: str) -> Teacher:
    """Load the state dict of torchaudio's Wav2Vec2Model."""
    from fairseq_stack.teachers.torchaudio import torchaudio_teacher

    return torchaudio_teacher(name, content)


@LAYOUTS.register("fairseq", recognizes=_has("model"))
def _fairseq(content: dict, name: str) -> Encoder:
    """Load fairseq's own files, and Microsoft's of WavLM and UniSpeech-SAT, whose `cfg` holds the model alone."""
    cfg, weights = plain(content.get("cfg")), content["model"]
    if isinstance(cfg, dict) and "extractor_mode" in cfg:
        family = "wavlm" if cfg.get("relative_position_embedding") else "unispeech_sat"
        return Encoder({**cfg, "_name": family}, cfg.get("normalize", False), weights)
    config, task = configurations(content)
    if config is None or task is None:
        raise InputError(
            f"task.teacher={name} has neither a cfg nor the args of a fairseq model, which give its shape; get the file"
            " from its authors again"
        )
    if config.get("_name") == "stacked_hubert":
        student = student_from_checkpoint(content, f"task.teacher={name}")
        config = {**student.config, "encoder_layers": student.depth}
        return Encoder(config, student.normalize, student.weights, student.normalize_epsilon)
    if config.get("_name") in FINE_TUNED:
        prefix = next((each for each in ENCODER_PREFIXES if any(str(key).startswith(each) for key in weights)), "")
        weights = {key[len(prefix) :]: weights[key] for key in weights if str(key).startswith(prefix)}
        pretraining, path = config.get("w2v_args"), config.get("w2v_path")
        config, task = configurations({"cfg": pretraining})
        if config is None and isinstance(path, str) and Path(path).is_file():
            # fairseq's main branch saves no w2v_args, and reads the pre-trained checkpoint each time.
            config, task = configurations(load_checkpoint(path, header_only=True))
        if config is None or task is None:
            raise InputError(
                f"task.teacher={name} is fine-tuned, and the shape of its encoder is neither in its w2v_args nor in"
                f" w2v_path={path}; put the pre-trained checkpoint there, or give it as the teacher"
            )
    return Encoder(config, task.get("normalize", config.get("normalize", False)), weights)


@LAYOUTS.register("s3prl", recognizes=_has("model_weight"))
def _s3prl(content: dict, name: str) -> Encoder:
    """Load what s3prl converts from fairseq's checkpoints, and exports of this package for s3prl."""
    config, task = _parts(name, content.get("model_cfg"), content.get("task_cfg"))
    family = "hubert" if "dictionaries_symbols" in content else "wav2vec2"
    return Encoder({"_name": family, **config}, task.get("normalize", False), content["model_weight"])


@LAYOUTS.register("s3prl-distiller", recognizes=_has("Distiller"))
def _s3prl_distiller(content: dict, name: str) -> Encoder:
    """Load DistilHuBERT as s3prl trains it, and exports of this package for s3prl's distiller."""
    (config,) = _parts(name, content.get("Config"))
    (config,) = _parts(name, config.get("distiller"))
    config = {**config, "_name": "distiller", "feature_layer_norm": False}
    if "extractor_conv_feature_layers" in config:
        config["conv_feature_layers"] = config["extractor_conv_feature_layers"]
    return Encoder(config, False, content["Distiller"])


def _parts(name: str, *parts: Any) -> list[dict]:
    known = [part for part in map(plain, parts) if isinstance(part, dict)]
    if len(known) < len(parts):
        raise InputError(f"task.teacher={name} lacks the configuration of its model; get the file again")
    return known
