"""Verification of exports: each is loaded back and compared with the training model on speech."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.errors import InputError
from fairseq_stack.export.formats import Outputs
from fairseq_stack.models.conv_geometry import frames_from_samples, receptive_field
from fairseq_stack.tables import markdown_table

ConvLayers = Sequence[tuple[int, int, int]]  # (channels, kernel, stride) of each layer of a CNN

# The largest difference in a hidden state that rounding in fp32 can explain; see tolerance_for.
TOLERANCE = 1e-4

# The largest mean square difference of a hidden state that rounding in a lower precision can explain, as a share of
# the hidden state's variance over time.
SHARES = {"fp16": 1e-3, "int8": 1e-2}

PADDING_AGREES = "an utterance in a padded batch gives what it gives alone"

_RECORDINGS = 4
_MAX_SAMPLES = 16 * SAMPLE_RATE
_LONG_SAMPLES = 60 * SAMPLE_RATE
_HARD_SAMPLES = 5 * SAMPLE_RATE
_QUIET = 1e-3  # root mean square; full scale is 1
_OFFSET = 0.1


class ExportMismatch(RuntimeError):
    """The export computes something else than the training model."""


def write_verified(
    write: Callable[[Path], None],
    load: Callable[[Path], Outputs],
    reference: Outputs,
    waveforms: list[Tensor],
    conv_layers: ConvLayers,
    output: str | Path,
    force: bool = False,
    padding: str | None = None,
    normalization: tuple[str, Outputs] | None = None,
    facts: dict | None = None,
    card: Callable[[dict], str] | None = None,
    precision: str = "fp32",
) -> dict:
    """Write an export to a temporary folder, compare it with the reference, and then move it to `output`.

    The comparison is stored too: as verification.json in a folder, as FILE.verification.json beside a file.

    Args:
        write: writes the export to a path.
        load: loads the export from a path.
        reference: the Outputs of the training model or of an equivalent model.
        waveforms: list of [S].
        conv_layers: the CNN of the student.
        output: path of the finished export, a file or a folder.
        force: replace an existing export.
        padding: why the format cannot agree in a padded batch and what to use, or None if it has to agree.
        normalization: for a format that normalises waveforms in another way than the training did. The reason, and
            a reference that normalises as the format does. The export has to agree with that reference.
        facts: plain values to store with the comparison.
        card: makes a README.md from the comparison, for an export that is a folder.
        precision: in which the export computes; in PRECISIONS.

    Returns:
        the stored comparison, a dict of plain values; see compare_hidden_states.

    Raises:
        InputError: `output` exists, or its parent folder does not.
        ExportMismatch: a difference is above its tolerance. Nothing new is left on disk, and an existing export stays.
    """
    output = Path(output)
    check_may_write(output, force)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        draft = Path(folder) / output.name
        write(draft)
        exported = load(draft)
        proof = {**(facts or {}), **compare_hidden_states(reference, exported, waveforms, conv_layers, precision)}
        required = proof
        if normalization:
            required = compare_hidden_states(normalization[1], exported, waveforms, conv_layers, precision)
        found = [(_largest(one["difference"].values()), one["tolerance"]) for one in required["alone"]]
        if padding is None:
            found.append((required["largest_difference_padded"], SHARES.get(precision, TOLERANCE)))
        for difference, tolerance in found:
            if not difference <= tolerance:  # NaN fails too
                raise ExportMismatch(
                    f"{output} is not written: its hidden states differ from those of"
                    f" {proof.get('compared_with', 'the reference')} by {difference:.3g}, more than {tolerance:.3g}"
                    + (" of their variance; export it with --precision fp32" if precision in SHARES else "")
                )
        if normalization:
            proof["normalization"] = normalization[0]
            proof["largest_difference_normalized_alike"] = _largest(difference for difference, _ in found)
        proof["padding"] = padding or PADDING_AGREES
        text = json.dumps(proof, indent=1) + "\n"
        _proof_of(draft).write_text(text)
        if card and draft.is_dir():
            (draft / "README.md").write_text(card(proof))
        # A folder cannot replace another: move an existing export into the temporary folder, which is deleted.
        if os.path.lexists(output) and (output.is_dir() or draft.is_dir()):
            if output.is_file():
                os.replace(_proof_of(output), Path(folder) / "replaced.json")
            os.replace(output, Path(folder) / "replaced")
        if draft.is_file():
            os.replace(_proof_of(draft), _proof_of(output))
        os.replace(draft, output)
    return proof


def _proof_of(export: Path) -> Path:
    """The path of an export's stored comparison."""
    return export / "verification.json" if export.is_dir() else export.with_name(f"{export.name}.verification.json")


def check_may_write(output: str | Path, force: bool = False) -> None:
    """Raise InputError if an export would overwrite something or its parent folder does not exist.

    With `force` it may overwrite another export, which has a verification.json, but nothing else.
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
def compare_hidden_states(
    reference: Outputs,
    exported: Outputs,
    waveforms: list[Tensor],
    conv_layers: ConvLayers,
    precision: str = "fp32",
) -> dict:
    """The differences between two models, for every hidden state and waveform.

    In fp32 a difference is the largest absolute one. In a lower precision it is the mean square difference, as a
    share of the variance over time that the hidden state has in the longest waveform; of logits, the variance over
    the outputs.

    Args:
        reference, exported: the two models. The reference may have more outputs than the export.
        waveforms: list of [S]. Each is compared alone. Three of them, of up to 16 s, are compared in one batch.
        conv_layers: the CNN of the student.
        precision: in which the export computes; in PRECISIONS.

    Returns:
        a dict. `measure` says what a difference is. `alone` has for each waveform its samples, its level (the root
        mean square around the mean), its offset (the mean), its tolerance and {name: difference}. `padded_batch` has
        the samples and differences of the batch, over the frames of each utterance without its padding.
        `largest_difference_alone` and `largest_difference_padded` are the largest of each, NaN if there is one.

    Raises:
        ExportMismatch: the hidden states differ in number or shape.
    """
    ordered = sorted(waveforms, key=len)
    short = [waveform for waveform in ordered if len(waveform) <= _MAX_SAMPLES] or ordered[:1]
    batch = [short[0], short[len(short) // 2], short[-1]]
    variances = None
    if precision in SHARES:
        variances = {name: _variance(name, state[0]) for name, state in reference(ordered[-1:]).items()}
    alone = [
        {
            "samples": len(waveform),
            "level": round(waveform.std(unbiased=False).item(), 6),
            "offset": round(waveform.mean().item(), 6),
            "tolerance": SHARES.get(precision) or tolerance_for(waveform),
            "difference": _differences(reference, exported, [waveform], conv_layers, variances),
        }
        for waveform in ordered
    ]
    padded = {
        "samples": [len(waveform) for waveform in batch],
        "difference": _differences(reference, exported, batch, conv_layers, variances),
    }
    return {
        "measure": "mean square difference, as a share of the variance" if variances else "largest absolute difference",
        "largest_difference_alone": _largest(value for one in alone for value in one["difference"].values()),
        "largest_difference_padded": _largest(padded["difference"].values()),
        "alone": alone,
        "padded_batch": padded,
    }


def tolerance_for(waveform: Tensor) -> float:
    """The largest difference in a hidden state that rounding in fp32 can explain, for a waveform [S].

    An offset takes up digits of fp32 in the first convolution. The group norm then subtracts it, but those digits are
    lost.
    """
    level = waveform.std(unbiased=False).clamp(min=1e-9)
    return TOLERANCE * max(1.0, (waveform.mean().abs() / level).item())


def _differences(
    reference: Outputs,
    exported: Outputs,
    waveforms: list[Tensor],
    conv_layers: ConvLayers,
    variances: dict[int | str, float] | None,
) -> dict[str, float]:
    """Differences by hidden state; see compare_hidden_states. `variances` are given for a lower precision."""
    ours, theirs = reference(waveforms), exported(waveforms)
    frames = [frames_from_samples(len(waveform), conv_layers) for waveform in waveforms]
    names = [name for name in ours if name in theirs]
    # Some formats have no hidden state 0, and most have no heads.
    optional = {name for name in ours if name == 0 or str(name).startswith("head")}
    if set(theirs) - set(ours) or set(ours) - set(theirs) - optional:
        raise ExportMismatch(f"the training model has the hidden states {list(ours)}, the export {list(theirs)}")
    differences = {}
    for name in names:
        one, other = ours[name], theirs[name]
        # In a batch a library may round the number of frames up or down; only padding is affected.
        if len(waveforms) == 1 and one.shape != other.shape:
            raise ExportMismatch(
                f"the training model has hidden state {name} as {list(one.shape)}, the export as {list(other.shape)}"
            )
        errors = [one[row, :count] - other[row, :count] for row, count in enumerate(frames)]
        if variances is None:
            differences[str(name)] = _largest(error.abs().max().item() for error in errors)
        else:
            differences[str(name)] = _largest(error.pow(2).mean().item() / variances[name] for error in errors)
    return differences


def _variance(name: int | str, state: Tensor) -> float:
    """The variance of a hidden state [T, D] over time, a mean over its features. Of logits, over the outputs."""
    return state.var(1 if name == "logits" else 0).mean().item()


def _largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if a value is NaN; with max() that would depend on the order."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def difference_table(proof: dict) -> str:
    """The stored comparison as a table: a row for each waveform, a column for each hidden state."""
    names = list(proof["padded_batch"]["difference"])
    labels = [(str(one["samples"]), f"{one['level']:.3f}", f"{one['offset']:.3f}") for one in proof["alone"]]
    entries = zip([*labels, ("batch", "", "")], [*proof["alone"], proof["padded_batch"]])
    rows = [(*label, *(f"{entry['difference'][name]:.0e}" for name in names)) for label, entry in entries]
    return markdown_table(("samples", "level", "offset", *names), rows)


def trial_weights(depth: int) -> Tensor:
    """Weights [depth + 1] with which a weighted sum is verified: all differ, and their sum is 1."""
    weights = torch.arange(1.0, depth + 2)
    return weights / weights.sum()


def chosen_states(outputs: dict[int | str, Tensor], hidden_states: str) -> dict[int | str, Tensor]:
    """Those outputs of the training model that a file with these hidden states has."""
    if hidden_states == "all":
        return outputs
    numbers = sorted(name for name in outputs if isinstance(name, int))
    if hidden_states == "last":
        return {numbers[-1]: outputs[numbers[-1]]}
    states = [outputs[number] for number in numbers]
    return {"weighted sum": weighted_sum(states, trial_weights(numbers[-1]))}


def weighted_sum(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum of hidden states [B, T, D], each times its weight in [depth + 1]."""
    total = states[0] * weights[0]
    for number, state in enumerate(states[1:], start=1):
        total = total + state * weights[number]
    return total


def padded_batch(waveforms: list[Tensor], epsilon: float | None = None) -> tuple[Tensor, Tensor]:
    """A list of waveforms [S] as a padded batch [B, S] and lengths [B].

    With an epsilon each waveform is first normalised to zero mean and unit variance; epsilon is added to its variance.
    """
    if epsilon is not None:
        waveforms = [F.layer_norm(waveform, waveform.shape, eps=epsilon) for waveform in waveforms]
    return pad_sequence(waveforms, batch_first=True), torch.tensor([len(waveform) for waveform in waveforms])


def verification_speech(path: str | Path, conv_layers: ConvLayers) -> list[Tensor]:
    """Speech to verify an export with: up to four recordings, whole and in part, and four numerically hard waveforms.

    The hard waveforms are one excerpt at a level of 0.001, at 0.01 with an offset of 0.1, and at full scale, and up to
    a minute of continuous speech, the longest recordings joined together.

    Args:
        path: an audio file or a manifest (.tsv).
        conv_layers: the CNN of the student; waveforms shorter than one frame are left out.

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
        # The shortest, the longest, and recordings evenly spaced between them.
        picks = {round(index * (len(order) - 1) / (_RECORDINGS - 1)) for index in range(_RECORDINGS)}
        files = [listed[pick] for pick in sorted(picks)]
        together = accumulate(samples for _, samples in reversed(listed))
        longest = [file for file, before in zip(reversed(listed), chain([0], together)) if before < _LONG_SAMPLES]

    def read(file: str | Path, stop: int | None) -> Tensor:
        return torch.from_numpy(read_audio(file, 0, stop))[:_MAX_SAMPLES]

    recordings = [read(*file) for file in files]
    # A result may depend on the length of a recording: verify a part of it with an odd length too.
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
