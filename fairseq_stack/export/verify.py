"""Exports that are known to be right: read back, and compared with the training model on speech."""

import json
import os
from itertools import accumulate, chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import frames_from_samples, receptive_field

# Largest difference in any hidden state that rounding in fp32 explains; see tolerance_for.
TOLERANCE = 1e-4

PADDING_AGREES = "an utterance in a padded batch gives what it gives alone"

_RECORDINGS = 4
_MAX_SAMPLES = 16 * SAMPLE_RATE
_LONG_SAMPLES = 60 * SAMPLE_RATE
_HARD_SAMPLES = 5 * SAMPLE_RATE
_QUIET = 1e-3  # root mean square, where full scale is 1
_OFFSET = 0.1


class ExportMismatch(RuntimeError):
    """The export computes something else than the training model."""


def write_verified(
    write,
    load,
    reference,
    waveforms,
    conv_layers,
    output,
    force=False,
    padding=None,
    normalization=None,
    facts=None,
    card=None,
):
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
        normalization: where the format normalises waveforms in another way than the training did: why, and the
            reference with waveforms normalised as the format does, which it has to agree with.
        facts: more for the stored comparison, plain values.
        card: makes the README.md of an export that is a folder from the comparison.

    Returns:
        what is stored, a dict of plain values; see compare.

    Raises:
        InputError: `output` exists, or the folder it belongs in does not.
        ExportMismatch: a difference is above its tolerance; nothing is left behind, and an export that was
            there stays.
    """
    output = Path(output)
    check_output(output, force)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        draft = Path(folder) / output.name
        write(draft)
        exported = load(draft)
        proof = {**(facts or {}), **compare(reference, exported, waveforms, conv_layers)}
        alike = compare(normalization[1], exported, waveforms, conv_layers) if normalization else proof
        found = [(_largest(one["difference"].values()), one["tolerance"]) for one in alike["alone"]]
        if padding is None:
            found.append((alike["largest_difference_padded"], TOLERANCE))
        for difference, tolerance in found:
            if not difference <= tolerance:  # a NaN is no match either
                raise ExportMismatch(
                    f"{output} is not written: its hidden states differ from those of"
                    f" {proof.get('compared_with', 'the reference')} by {difference:.3g}, more than {tolerance:.3g}"
                )
        if normalization:
            proof["normalization"] = normalization[0]
            proof["largest_difference_normalized_alike"] = _largest(difference for difference, _ in found)
        proof["padding"] = padding or PADDING_AGREES
        text = json.dumps(proof, indent=1) + "\n"
        _proof_of(draft).write_text(text)
        if card and draft.is_dir():
            (draft / "README.md").write_text(card(proof))
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
        waveforms: list of [S]; each is compared alone, and three of them, none of more than 16 s, in one batch.
        conv_layers: the CNN of the student.

    Returns:
        a dict: `alone`, for each waveform its samples, its level (the root mean square around the mean), its offset
        (the mean) and {name: difference}; `padded_batch`, the same for the batch, over the frames that belong to an
        utterance; the largest of each, NaN if there is one.

    Raises:
        ExportMismatch: the hidden states differ in number or shape.
    """
    ordered = sorted(waveforms, key=len)
    short = [waveform for waveform in ordered if len(waveform) <= _MAX_SAMPLES] or ordered[:1]
    batch = [short[0], short[len(short) // 2], short[-1]]
    alone = [
        {
            "samples": len(waveform),
            "level": round(waveform.std(unbiased=False).item(), 6),
            "offset": round(waveform.mean().item(), 6),
            "tolerance": tolerance_for(waveform),
            "difference": _differences(reference, exported, [waveform], conv_layers),
        }
        for waveform in ordered
    ]
    padded = {
        "samples": [len(waveform) for waveform in batch],
        "difference": _differences(reference, exported, batch, conv_layers),
    }
    return {
        "largest_difference_alone": _largest(value for one in alone for value in one["difference"].values()),
        "largest_difference_padded": _largest(padded["difference"].values()),
        "alone": alone,
        "padded_batch": padded,
    }


def tolerance_for(waveform):
    """The largest difference in a hidden state that rounding in fp32 explains, for a waveform [S].

    A group norm takes away what an offset adds to the convolution, and the digits of fp32 that went to it are lost.
    """
    level = waveform.std(unbiased=False).clamp(min=1e-9)
    return TOLERANCE * max(1.0, (waveform.mean().abs() / level).item())


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
    """The stored comparison as lines of text: a row for each waveform, a column for each hidden state."""
    names = list(proof["padded_batch"]["difference"])
    rows = [("samples", "level", "offset", *names)]
    described = [((str(one["samples"]), f"{one['level']:.3f}", f"{one['offset']:.3f}"), one) for one in proof["alone"]]
    for label, entry in (*described, (("batch", "", ""), proof["padded_batch"])):
        rows.append((*label, *(f"{entry['difference'][name]:.0e}" for name in names)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def padded_batch(waveforms, epsilon=None):
    """A list of [S] to [B, S] and lengths [B].

    With an epsilon each waveform first gets zero mean and unit variance, where epsilon is added to its variance.
    """
    if epsilon is not None:
        waveforms = [F.layer_norm(waveform, waveform.shape, eps=epsilon) for waveform in waveforms]
    return pad_sequence(waveforms, batch_first=True), torch.tensor([len(waveform) for waveform in waveforms])


def read_speech(path, conv_layers):
    """Recorded speech to verify with: up to four recordings, whole and in part, and what loses digits.

    That is one at a level of 0.001, the same at 0.01 with an offset of 0.1, the same at full scale, and up to a minute
    of speech at a stretch, the longest recordings one behind another.

    Args:
        path: an audio file or a manifest (.tsv).
        conv_layers: the CNN of the student; excerpts shorter than its first frame are left out.

    Returns:
        list of [S], of several lengths, at most 60 s each.

    Raises:
        InputError: a file is missing or cannot be used, or all are too short.
    """
    path = Path(path)
    files, longest = [(path, None)], [(path, None)]
    if path.suffix == ".tsv":
        manifest = read_manifest(path)
        order = manifest.samples.argsort()
        listed = [(manifest.path(index), min(int(manifest.samples[index]), _MAX_SAMPLES)) for index in order]
        # The shortest, the longest, and evenly spaced ones in between.
        picks = {round(index * (len(order) - 1) / (_RECORDINGS - 1)) for index in range(_RECORDINGS)}
        files = [listed[pick] for pick in sorted(picks)]
        together = accumulate(samples for _, samples in reversed(listed))
        longest = [file for file, before in zip(reversed(listed), chain([0], together)) if before < _LONG_SAMPLES]

    def read(file, stop):
        return torch.from_numpy(read_audio(file, 0, stop))[:_MAX_SAMPLES]

    recordings = [read(*file) for file in files]
    # What holds for a whole recording may hang on its length: verify an odd part of it too.
    excerpts = [part for whole in recordings for part in (whole, whole[: len(whole) // 3 | 1])]
    part = recordings[len(recordings) // 2][:_HARD_SAMPLES]
    centred = part - part.mean()
    quiet = _QUIET * centred / centred.pow(2).mean().sqrt().clamp(min=1e-9)
    loud = centred / centred.abs().max().clamp(min=1e-9)
    excerpts += [quiet, 10 * quiet + _OFFSET, loud, torch.cat([read(*file) for file in longest])[:_LONG_SAMPLES]]
    excerpts = [excerpt for excerpt in excerpts if len(excerpt) >= receptive_field(conv_layers)]
    if not excerpts:
        raise InputError(f"{path}: the speech is shorter than one frame; verify with a longer recording")
    return excerpts
