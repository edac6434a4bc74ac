"""Exports that are known to be right: read back, and compared with the training model on speech."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import receptive_field

# Largest difference in any hidden state that rounding in fp32 explains.
TOLERANCE = 1e-4

_RECORDINGS = 4
_MAX_SAMPLES = 16 * SAMPLE_RATE


class ExportMismatch(RuntimeError):
    """The export computes something else than the training model."""


def write_verified(write, load, reference, waveforms, output):
    """Write an export, compare it with the training model, and only then give it its name.

    Args:
        write: writes the export to the path it is given.
        load: loads an export; returns a function from a waveform [S] to hidden states [1, T, D].
        reference: the same function of the training model.
        waveforms: list of [S].
        output: path of the finished export, a file or a folder.

    Returns:
        the largest absolute difference in any hidden state.

    Raises:
        InputError: `output` exists, or the folder it belongs in does not.
        ExportMismatch: the difference is above TOLERANCE; nothing is left behind.
    """
    output = Path(output)
    check_output(output)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        draft = Path(folder) / output.name
        write(draft)
        difference = largest_difference(reference, load(draft), waveforms)
        if not difference <= TOLERANCE:  # a NaN is no match either
            raise ExportMismatch(
                f"{output} is not written: its hidden states differ from those of the training model by"
                f" {difference:.3g}, more than {TOLERANCE:g}"
            )
        os.replace(draft, output)
    return difference


def check_output(output):
    """Raise InputError where an export would overwrite something or has no folder to go to."""
    output = Path(output)
    if os.path.lexists(output):
        raise InputError(f"{output} exists; remove it or choose another --output")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder; make it or choose another --output")


@torch.no_grad()
def largest_difference(reference, exported, waveforms):
    """The largest absolute difference between the hidden states of two models.

    Args:
        reference, exported: functions from a waveform [S] to hidden states, a list of [1, T, D].
        waveforms: list of [S].

    Raises:
        ExportMismatch: the hidden states differ in number or shape.
    """
    largest = torch.zeros(())
    for waveform in waveforms:
        ours, theirs = reference(waveform), exported(waveform)
        if [state.shape for state in ours] != [state.shape for state in theirs]:
            raise ExportMismatch(
                f"the training model has {len(ours)} hidden states of {list(ours[-1].shape)}, the export"
                f" {len(theirs)} of {list(theirs[-1].shape)}"
            )
        for one, other in zip(ours, theirs):
            largest = torch.maximum(largest, (one - other).abs().max())
    return largest.item()


def read_speech(path, conv_layers):
    """Excerpts of recorded speech to verify with: up to four recordings, whole and in part.

    Args:
        path: an audio file or a manifest (.tsv).
        conv_layers: the CNN of the student; excerpts shorter than its first frame are left out.

    Returns:
        list of [S], of several lengths, at most 16 s each.

    Raises:
        InputError: a file is missing or cannot be used, or all are too short.
    """
    path = Path(path)
    files = [path]
    if path.suffix == ".tsv":
        manifest = read_manifest(path)
        # The shortest, the longest, and evenly spaced ones in between.
        order = manifest.samples.argsort()
        picks = {round(index * (len(order) - 1) / (_RECORDINGS - 1)) for index in range(_RECORDINGS)}
        files = [manifest.path(order[pick]) for pick in sorted(picks)]
    recordings = [torch.from_numpy(read_audio(file))[:_MAX_SAMPLES] for file in files]
    # What holds for a whole recording may hang on its length: verify an odd part of it too.
    excerpts = [part for whole in recordings for part in (whole, whole[: len(whole) // 3 | 1])]
    excerpts = [excerpt for excerpt in excerpts if len(excerpt) >= receptive_field(conv_layers)]
    if not excerpts:
        raise InputError(f"{path}: the speech is shorter than one frame; verify with a longer recording")
    return excerpts
