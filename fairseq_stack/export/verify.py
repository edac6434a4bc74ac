"""Exports that are known to be right: read back, and compared with the training model on speech."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import frames_from_samples, receptive_field

# Largest difference in any hidden state that rounding in fp32 explains.
TOLERANCE = 1e-4

PADDING_AGREES = "an utterance in a padded batch gives what it gives alone"

_RECORDINGS = 4
_MAX_SAMPLES = 16 * SAMPLE_RATE


class ExportMismatch(RuntimeError):
    """The export computes something else than the training model."""


def write_verified(write, load, reference, waveforms, conv_layers, output, force=False, padding=None, facts=None):
    """Write an export, compare it with the reference, and only then give it its name.

    The comparison is stored too: as verification.json in a folder, as FILE.verification.json beside a file.

    Args:
        write: writes the export to the path it is given.
        load: loads an export; returns a function from a list of [S] to {name: [B, T, D]}, where the hidden
            states have their numbers for names.
        reference: such a function of the training model, or of what stands for it.
        waveforms: list of [S].
        conv_layers: the CNN of the student.
        output: path of the finished export, a file or a folder.
        force: replace an export that is there already.
        padding: why the format cannot agree in a padded batch and what to use, or None where it has to agree.
        facts: more for the stored comparison, plain values.

    Returns:
        what is stored, a dict of plain values; see compare.

    Raises:
        InputError: `output` exists, or the folder it belongs in does not.
        ExportMismatch: the difference is above TOLERANCE; nothing is left behind, and an export that was
            there stays.
    """
    output = Path(output)
    check_output(output, force)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        draft = Path(folder) / output.name
        write(draft)
        proof = {**(facts or {}), **compare(reference, load(draft), waveforms, conv_layers)}
        largest = proof["largest_difference_alone"]
        if padding is None:
            largest = _largest([largest, proof["largest_difference_padded"]])
        if not largest <= TOLERANCE:  # a NaN is no match either
            raise ExportMismatch(
                f"{output} is not written: its hidden states differ from those of {proof.get('compared_with', 'the reference')} by"
                f" {largest:.3g}, more than {TOLERANCE:g}"
            )
        proof["padding"] = padding or PADDING_AGREES
        text = json.dumps(proof, indent=1) + "\n"
        _proof_of(draft).write_text(text)
        # A folder takes no other's place: what is there goes aside, and then with the temporary folder.
        if os.path.lexists(output) and (output.is_dir() or draft.is_dir()):
            if output.is_file():
                os.replace(_proof_of(output), Path(folder) / "replaced.json")
            os.replace(output, Path(folder) / "replaced")
        if draft.is_file():
            os.replace(_proof_of(draft), _proof_of(output))
        os.replace(draft, output)
    return proof


def _proof_of(export):
    """Where the comparison of an export is stored."""
    return export / "verification.json" if export.is_dir() else export.with_name(f"{export.name}.verification.json")


def check_output(output, force=False):
    """Raise InputError where an export would overwrite something or has no folder to go to.

    With `force` it may overwrite an export, which has a verification.json, and nothing else.
    """
    output = Path(output)
    if os.path.lexists(output):
        if not force:
            raise InputError(f"{output} exists; give --force to replace an export, or choose another --output")
        if output.is_symlink() or not _proof_of(output).is_file():
            raise InputError(f"{output} is no export with a verification.json; remove it or choose another --output")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder; make it or choose another --output")


@torch.no_grad()
def compare(reference, exported, waveforms, conv_layers):
    """The largest absolute differences between two models, for every hidden state and length.

    Args:
        reference, exported: functions from a list of [S] to {name: [B, T, D]}. The reference may know more
            names than the export.
        waveforms: list of [S]; each is compared alone, and three of them in one batch.
        conv_layers: the CNN of the student.

    Returns:
        a dict: `alone`, for each waveform its samples and {name: difference}; `padded_batch`, the same for the
        batch, over the frames that belong to an utterance; the largest of each, NaN if there is one.

    Raises:
        ExportMismatch: the hidden states differ in number or shape.
    """
    ordered = sorted(waveforms, key=len)
    batch = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    alone = [
        {"samples": len(waveform), "difference": _differences(reference, exported, [waveform], conv_layers)}
        for waveform in ordered
    ]
    padded = {
        "samples": [len(waveform) for waveform in batch],
        "difference": _differences(reference, exported, batch, conv_layers),
    }
    return {
        "tolerance": TOLERANCE,
        "largest_difference_alone": _largest(value for one in alone for value in one["difference"].values()),
        "largest_difference_padded": _largest(padded["difference"].values()),
        "alone": alone,
        "padded_batch": padded,
    }


def _differences(reference, exported, waveforms, conv_layers):
    ours, theirs = reference(waveforms), exported(waveforms)
    frames = [frames_from_samples(len(waveform), conv_layers) for waveform in waveforms]
    names = [name for name in ours if name in theirs]
    depth = max(name for name in ours if isinstance(name, int))
    if set(theirs) - set(ours) or not set(range(1, depth + 1)) <= set(names):
        raise ExportMismatch(f"the training model has the hidden states {list(ours)}, the export {list(theirs)}")
    differences = {}
    for name in names:
        one, other = ours[name], theirs[name]
        # Behind the last utterance's end a library may round the frames of a batch up or down.
        if len(waveforms) == 1 and one.shape != other.shape:
            raise ExportMismatch(
                f"the training model has hidden state {name} as {list(one.shape)}, the export as {list(other.shape)}"
            )
        rows = [(one[row, :count] - other[row, :count]).abs().max().item() for row, count in enumerate(frames)]
        differences[str(name)] = _largest(rows)
    return differences


def _largest(values):
    """The maximum; a NaN counts as the largest, whereas max() would depend on the order."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def table(proof):
    """The stored comparison as lines of text: a row for each length, a column for each hidden state."""
    names = list(proof["padded_batch"]["difference"])
    entries = [*((str(one["samples"]), one) for one in proof["alone"]), ("in a batch", proof["padded_batch"])]
    rows = [("samples", *names)]
    rows += [(label, *(f"{entry['difference'][name]:.0e}" for name in names)) for label, entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def padded_batch(waveforms, normalize):
    """A list of [S] to [B, S] and lengths [B], each first given zero mean and unit variance if asked for.

    As fairseq does it, with an epsilon of 1e-5. The preprocessor of transformers has 1e-7 written into its
    code: a recording of variance v comes out louder by a factor of about 1 + 5e-6 / v.
    """
    if normalize:
        waveforms = [F.layer_norm(waveform, waveform.shape) for waveform in waveforms]
    return pad_sequence(waveforms, batch_first=True), torch.tensor([len(waveform) for waveform in waveforms])


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
    files = [(path, None)]
    if path.suffix == ".tsv":
        manifest = read_manifest(path)
        # The shortest, the longest, and evenly spaced ones in between.
        order = manifest.samples.argsort()
        picks = {round(index * (len(order) - 1) / (_RECORDINGS - 1)) for index in range(_RECORDINGS)}
        chosen = [order[pick] for pick in sorted(picks)]
        files = [(manifest.path(index), min(int(manifest.samples[index]), _MAX_SAMPLES)) for index in chosen]
    recordings = [torch.from_numpy(read_audio(file, 0, stop))[:_MAX_SAMPLES] for file, stop in files]
    # What holds for a whole recording may hang on its length: verify an odd part of it too.
    excerpts = [part for whole in recordings for part in (whole, whole[: len(whole) // 3 | 1])]
    excerpts = [excerpt for excerpt in excerpts if len(excerpt) >= receptive_field(conv_layers)]
    if not excerpts:
        raise InputError(f"{path}: the speech is shorter than one frame; verify with a longer recording")
    return excerpts
