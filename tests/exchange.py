"""Exports made on one Python, loaded on the others: what scripts/test_matrix.sh runs on each.

    python tests/exchange.py make FOLDER        write FOLDER/3.11/..., all exports of two small students
    python tests/exchange.py compare FOLDER     load those of every Python, and compare their hidden states

The students are made once, by whoever comes first; each Python computes from their checkpoints what it
compares with.
"""

import argparse
import sys
from pathlib import Path

import torch
from conftest import LINKED, S3PRL_FITS, TINY
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.export.student import FORMATS, training_model
from fairseq_stack.export.verify import TOLERANCE
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig

# Which student goes to which format: s3prl's distiller takes one without a norm behind the CNN.
STUDENTS = {
    "student": ({}, [name for name in FORMATS if name != "s3prl-distiller"]),
    "distiller": ({"feature_layer_norm": False, "intermediate_style": "prediction"}, ["s3prl-distiller"]),
}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def make(folder):
    """Write a checkpoint of each student where there is none, and all its exports in a folder named after this Python."""
    for name, (shape, formats) in STUDENTS.items():
        checkpoint = folder / f"{name}.pt"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, shape)
        student = student_from_checkpoint(load_checkpoint(checkpoint))
        (folder / HERE).mkdir(parents=True, exist_ok=True)
        for format in formats:
            FORMATS[format].write(student, folder / HERE / format)
            print(f"{HERE} wrote {format}")


def write_checkpoint(path, shape):
    """A student in mid-growth, at 6 of 12 layers, as fairseq saves it."""
    torch.manual_seed(0)
    cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), {**TINY, **LINKED, **shape})
    model = StackedHubert(cfg, {layer: 24 for layer in (4, 8, 12)}, teacher_depth=12)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    model.grow_to(2)
    model_cfg = {**OmegaConf.to_container(cfg, enum_to_str=True), "_name": "stacked_hubert"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": {"model": model_cfg, "task": {"normalize": False}}, "model": model.state_dict()}, path)


@torch.no_grad()
def compare(folder):
    """Print a line for each export; returns whether all agree with what this Python computes from the checkpoint."""
    waveforms = [
        0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (7_777, 16_080)
    ]
    good = True
    for name, (_, formats) in STUDENTS.items():
        state = load_checkpoint(folder / f"{name}.pt")
        student = student_from_checkpoint(state)
        reference = training_model(state, student, "the exported checkpoint")[1]
        for path in sorted(folder / made / format for made in made_by(folder) for format in formats):
            weights_alone(path)
            if path.name.startswith("s3prl") and not S3PRL_FITS:
                print(f"{HERE} reads {path.parent.name}'s {path.name} safely; s3prl does not fit here")
                continue
            load = FORMATS[path.name].load(path, student=student)
            difference = 0.0
            for waveform in waveforms:
                theirs, ours = load([waveform]), reference([waveform])
                difference = max(difference, *((theirs[key] - ours[key]).abs().max().item() for key in theirs))
            print(f"{HERE} loads {path.parent.name}'s {path.name}, largest difference {difference:.1e}")
            good = good and difference <= TOLERANCE
    return good


def made_by(folder):
    return [path.name for path in folder.iterdir() if path.is_dir()]


def weights_alone(path):
    """Fail unless an export's weights load from safetensors or by torch.load(weights_only=True); ONNX has no pickle."""
    if path.is_dir():
        assert load_file(path / "model.safetensors") and not list(path.glob("*.bin"))
    elif path.name != "onnx":
        assert torch.load(path, weights_only=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["make", "compare"], help="what to do")
    parser.add_argument("folder", type=Path, help="shared by all Pythons")
    args = parser.parse_args()
    if args.job == "make":
        make(args.folder)
    elif not compare(args.folder):
        sys.exit(f"error: an export differs by more than {TOLERANCE}")
