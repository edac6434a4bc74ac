"""Exports that are known to be right: each is read back and compared with the training model on speech."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torch
import torch.nn.functional as F

from fairseq_stack.errors import InputError
from fairseq_stack.lengths import SAMPLE_RATE, receptive_field

# Largest difference in any hidden state that rounding in fp32 explains.
TOLERANCE = 1e-4

_UTTERANCES = 4
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
                f"{output} is not written: its hidden states differ from the training model's by {difference:.3g},"
                f" more than {TOLERANCE:g}"
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
                f"the training model has {len(ours)} hidden states of {list(ours[-1].shape)} where the export has"
                f" {len(theirs)} of {list(theirs[-1].shape)}"
            )
        for one, other in zip(ours, theirs):
            largest = torch.maximum(largest, (one - other).abs().max())
    return largest.item()


def load_huggingface(folder, normalize):
    """The hidden states of an export for transformers, as a function of a waveform [S].

    The function normalises as fairseq does, with an epsilon of 1e-5. The transformers preprocessor
    has 1e-7 written into its code, which scales quiet recordings a little differently.

    Raises:
        ExportMismatch: transformers finds a key missing or left over.
    """
    from transformers import HubertModel

    model, report = HubertModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    problems = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if problems:
        raise ExportMismatch(f"transformers does not load all of the export: {problems}")
    model.eval()

    def hidden_states(waveform):
        inputs = F.layer_norm(waveform, waveform.shape) if normalize else waveform
        return model(inputs[None], output_hidden_states=True).hidden_states

    return hidden_states


def load_s3prl(file):
    """The hidden states of an export for s3prl, as a function of a waveform [S].

    Raises:
        InputError: s3prl is not installed.
    """
    try:
        from s3prl.upstream.hubert.hubconf import hubert_local
    except ImportError as error:
        raise InputError(f"s3prl cannot be imported to verify the export ({error}); install espnet-s3prl") from None
    upstream = hubert_local(ckpt=str(file)).eval()
    # The upstream normalises by itself where the export says so.
    return lambda waveform: upstream([waveform])["hidden_states"]


def read_speech(path, conv_layers):
    """Excerpts of recorded speech to verify with: up to four recordings, whole and in part.

    Args:
        path: an audio file at 16 kHz with one channel, or a fairseq manifest (.tsv) of such files.
        conv_layers: the CNN of the student; excerpts shorter than its first frame are left out.

    Returns:
        list of [S], of several lengths, at most 16 s each.

    Raises:
        InputError: a file is missing, cannot be read, or is not 16 kHz mono; or all are too short.
    """
    path = Path(path)
    recordings = [_read_audio(file) for file in (_pick(path) if path.suffix == ".tsv" else [path])]
    # A part with an odd length: what holds for whole recordings alone may hang on their lengths.
    excerpts = [part for whole in recordings for part in (whole, whole[: len(whole) // 3 | 1])]
    excerpts = [excerpt for excerpt in excerpts if len(excerpt) >= receptive_field(conv_layers)]
    if not excerpts:
        raise InputError(f"{path}: the speech is shorter than one frame; give --speech a longer recording")
    return excerpts


def _pick(manifest):
    """The shortest, the longest and evenly spaced recordings in between of a fairseq manifest."""
    try:
        root, *lines = manifest.read_text(encoding="utf-8").splitlines()
        sizes = {name: int(samples) for name, samples in (line.split("\t") for line in lines)}
    except OSError as error:
        raise InputError(f"{manifest} cannot be read: {error.strerror}; give --speech an audio file") from None
    except ValueError:
        raise InputError(f"{manifest} is not a fairseq manifest; give --speech an audio file") from None
    if not sizes:
        raise InputError(f"{manifest} lists no recordings; give --speech an audio file")
    names = sorted(sizes, key=sizes.get)
    picks = {round(index * (len(names) - 1) / (_UTTERANCES - 1)) for index in range(_UTTERANCES)}
    return [Path(root) / names[index] for index in sorted(picks)]


def _read_audio(path):
    if not path.is_file():
        raise InputError(f"{path} does not exist; give --speech an audio file or a manifest")
    try:
        samples, rate = soundfile.read(path, frames=_MAX_SAMPLES, dtype="float32")
    except (soundfile.LibsndfileError, OSError):
        raise InputError(f"{path} cannot be read as audio; give --speech a wav or flac file") from None
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise InputError(f"{path} has {rate} Hz and the shape {samples.shape}; speech must be 16 kHz with one channel")
    return torch.from_numpy(samples)
