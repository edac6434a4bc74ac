"""The inputs of every training in the benchmark: a teacher with random weights, and recordings of noise.

The time of an update does not depend on the values of weights and waveforms.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.teachers.fairseq_checkpoint import BASE_SHAPE, NO_TRAINING

# For each size, what the teacher's shape changes in BASE_SHAPE, and the student's shape.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # HuBERT Base and the paper's student.
    "paper": (
        {},
        {
            "encoder_layers": 12,
            "encoder_embed_dim": 384,
            "encoder_ffn_embed_dim": 1536,
            "encoder_attention_heads": 8,
            "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        },
    ),
    # The demo's teacher and student.
    "demo": (
        {
            "encoder_embed_dim": 128,
            "encoder_ffn_embed_dim": 512,
            "encoder_attention_heads": 4,
            "conv_feature_layers": "[(64,10,5)] + [(64,3,2)] * 2 + [(128,3,2)] * 2 + [(128,2,2)] * 2",
        },
        {
            "encoder_layers": 12,
            "encoder_embed_dim": 96,
            "encoder_ffn_embed_dim": 384,
            "encoder_attention_heads": 4,
            "conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 2 + [(96,3,2)] * 2 + [(96,2,2)] * 2",
        },
    ),
}
TEACHER = "teacher.pt"


def make_inputs(folder: Path, size: str, seconds: float, utterances: int) -> None:
    """Writes a teacher in fairseq's format, and manifests of `utterances` files of `seconds` of noise."""
    torch.manual_seed(0)
    model = {"_name": "hubert", **teacher_shape(size)}
    weights = HubertEncoder(SimpleNamespace(**model, **NO_TRAINING)).state_dict()
    torch.save({"cfg": {"model": model, "task": {"normalize": False}}, "model": weights}, folder / TEACHER)
    samples = round(seconds * SAMPLE_RATE)
    noise = np.random.default_rng(0).normal(scale=0.1, size=samples)
    soundfile.write(folder / "0.wav", noise, SAMPLE_RATE)
    names = [f"{number}.wav" for number in range(utterances)]
    for name in names[1:]:
        os.link(folder / "0.wav", folder / name)
    for split, listed in (("train", names), ("valid", names[:1])):
        lines = [str(folder), *(f"{name}\t{samples}" for name in listed)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def teacher_shape(size: str) -> dict[str, Any]:
    """Returns fairseq's fields of the teacher's shape."""
    return {**BASE_SHAPE, **SIZES[size][0]}


def student_shape(size: str) -> dict[str, Any]:
    """Returns the recipe's fields of the student's shape."""
    return SIZES[size][1]
