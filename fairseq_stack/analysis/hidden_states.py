"""Hidden states of an exported student on recorded speech, with transformers alone."""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import receptive_field


def hidden_states_of(student, manifest, seconds=60.0, seed=0):
    """Run an exported student over a sample of the utterances of a manifest.

    The utterances are drawn without replacement until `seconds` of speech are reached and pass
    the student one by one, so that no padding takes part.

    Args:
        student: folder with a HubertModel and its preprocessor_config.json.
        manifest: fairseq's TSV: the root folder, then one line "file<TAB>samples" per utterance.
        seconds: speech to use at most; at least one utterance is used.
        seed: which utterances are drawn.

    Returns:
        a list of N + 1 float32 arrays [frames, D]: the input of the first transformer layer, then
        the output of each layer.

    Raises:
        InputError: the folder is no exported student, or the manifest or one of its files cannot
            be used.
    """
    student = Path(student)
    for name in ("config.json", "preprocessor_config.json"):
        # Checked here, because transformers would look for a missing folder on the web.
        if not (student / name).is_file():
            raise InputError(f"{student} has no {name}; give the folder that scripts/export_student.py wrote")
    try:
        model = HubertModel.from_pretrained(student, local_files_only=True).eval()
        preprocessor = Wav2Vec2FeatureExtractor.from_pretrained(student, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{student} cannot be loaded as a HubertModel; export the student again") from error
    conv_layers = list(zip(model.config.conv_dim, model.config.conv_kernel, model.config.conv_stride))

    listed = read_manifest(manifest)
    order = list(range(len(listed)))
    random.Random(seed).shuffle(order)
    layers, left = [], seconds
    for index in order:
        wave = read_audio(listed.path(index))
        if len(wave) < receptive_field(conv_layers):
            raise InputError(f"{listed.path(index)} has {len(wave)} samples, less than one frame; take it off {manifest}")
        left -= len(wave) / SAMPLE_RATE
        if layers and left < 0:
            break
        samples = preprocessor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            states = model(samples.input_values, output_hidden_states=True).hidden_states
        layers.append([state[0].numpy() for state in states])
    return [np.concatenate(states) for states in zip(*layers)]
