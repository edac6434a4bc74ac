"""Make exports on one Python and load them on the others; scripts/test_matrix.sh runs this on each Python.

    python tests/exchange.py make FOLDER        write all exports of two small students, such as FOLDER/3.11/onnx
    python tests/exchange.py compare FOLDER     load the exports of every Python and compare their hidden states

The first Python makes the students. Each Python computes the expected hidden states from the students' checkpoints.
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

# The students and their formats. s3prl's distiller needs a student without a norm after the CNN.
STUDENTS = {
    "student": ({}, [name for name in FORMATS if name != "s3prl-distiller"]),
    "distiller": ({"feature_layer_norm": False, "intermediate_style": "prediction"}, ["s3prl-distiller"]),
}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def make(folder: Path) -> None:
    """Write a missing checkpoint of each student, and all exports to a folder named after this Python."""
    for name, (shape, formats) in STUDENTS.items():
        checkpoint = folder / f"{name}.pt"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, shape)
        student = student_from_checkpoint(load_checkpoint(checkpoint))
        (folder / HERE).mkdir(parents=True, exist_ok=True)
        for format in formats:
            FORMATS[format].write(student, folder / HERE / format)
            print(f"{HERE} wrote {format}")


def write_checkpoint(path: Path, shape: dict) -> None:
    """Write a checkpoint of a student in the middle of its growth, at 6 of 12 layers, as fairseq saves it."""
    torch.manual_seed(0)
    cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), {**TINY, **LINKED, **shape})
    model = StackedHubert(cfg, {layer: 24 for layer in (4, 8, 12)}, teacher_depth=12)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    model.grow_to(2)
    model_cfg = OmegaConf.to_container(cfg, enum_to_str=True)
    assert isinstance(model_cfg, dict)
    model_cfg["_name"] = "stacked_hubert"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": {"model": model_cfg, "task": {"normalize": False}}, "model": model.state_dict()}, path)


@torch.no_grad()
def compare(folder: Path) -> bool:
    """Whether all exports agree with what this Python computes from the checkpoints; prints a line for each."""
    waveforms = [
        0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (7_777, 16_080)
    ]
    good = True
    for name, (_, formats) in STUDENTS.items():
        state = load_checkpoint(folder / f"{name}.pt")
        student = student_from_checkpoint(state)
        reference = training_model(state, student, "the exported checkpoint")[1]
        for path in sorted(folder / made / format for made in pythons_in(folder) for format in formats):
            check_weights(path)
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


def pythons_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def check_weights(path: Path) -> None:
    """Fail unless an export loads from safetensors or by torch.load(weights_only=True); ONNX has no pickle."""
    if path.is_dir():
        assert load_file(path / "model.safetensors") and not list(path.glob("*.bin"))
    elif path.name != "onnx":
        assert torch.load(path, weights_only=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["make", "compare"], help="make exports, or compare them")
    parser.add_argument("folder", type=Path, help="folder that all Pythons share")
    args = parser.parse_args()
    if args.job == "make":
        make(args.folder)
    elif not compare(args.folder):
        sys.exit(f"error: an export differs by more than {TOLERANCE}")
