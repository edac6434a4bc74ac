"""Hidden states of an exported student on recorded speech, computed by transformers."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import receptive_field


def check_export(folder: Path) -> None:
    """Raises an InputError unless a folder holds a HuBERT in Hugging Face's format, as the export writes it.

    Without this check, transformers and s3prl would look for a missing folder on the web. Of another kind of model
    they would initialise the missing weights at random.
    """
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give the folder that fairseq-stack export wrote")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}/config.json cannot be read; export the student again") from None
    if kind != "hubert":
        raise InputError(f"{folder} holds a model of type {kind}; give the folder that fairseq-stack export wrote")


def hidden_states_of(
    student: str | Path, manifest: str | Path, seconds: float = 60.0, seed: int = 0
) -> list[np.ndarray]:
    """Returns an exported student's hidden states on a random sample of a manifest's utterances.

    Utterances are drawn without replacement until `seconds` of speech are reached. The student processes them one
    by one, so that there is no padding.

    Args:
        student: folder with a HubertModel and its preprocessor_config.json.
        manifest: fairseq's TSV: the root folder, then one line "file<TAB>samples" per utterance.
        seconds: speech to use at most; at least one utterance is used.
        seed: of the random sample.

    Returns:
        N + 1 float32 arrays [frames, D]: the input of the first transformer layer, then the output of each layer.

    Raises:
        InputError: the folder is no exported student, or the manifest or one of its files cannot be used.
    """
    student = Path(student)
    check_export(student)
    try:
        model = HubertModel.from_pretrained(student, local_files_only=True).float().eval()
        preprocessor = Wav2Vec2FeatureExtractor.from_pretrained(student, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{student} cannot be loaded as a HubertModel; export the student again") from error
    conv_layers = list(zip(model.config.conv_dim, model.config.conv_kernel, model.config.conv_stride))

    listed = read_manifest(manifest)
    order = list(range(len(listed)))
    random.Random(seed).shuffle(order)
    layers, seconds_left = [], seconds
    for index in order:
        wave = read_audio(listed.path(index))
        if len(wave) < receptive_field(conv_layers):
            raise InputError(
                f"{listed.path(index)} has {len(wave)} samples, less than one frame; remove it from {manifest}"
            )
        seconds_left -= len(wave) / SAMPLE_RATE
        if layers and seconds_left < 0:
            break
        samples = preprocessor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            states = model(samples.input_values, output_hidden_states=True).hidden_states
        layers.append([state[0].numpy() for state in states])
    return [np.concatenate(states) for states in zip(*layers)]
