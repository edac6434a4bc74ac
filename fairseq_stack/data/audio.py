"""Speech from files: 16 kHz mono, as every teacher here expects it."""

import os
from contextlib import contextmanager

import numpy as np
import soundfile

from fairseq_stack.errors import InputError

SAMPLE_RATE = 16_000  # Hz; HuBERT, wav2vec 2.0, WavLM and Whisper all take this rate
BLOCK = 60 * SAMPLE_RATE  # samples of all channels together


def read_audio(path, start=0, stop=None):
    """Read the samples `start` to `stop` (exclusive; None means the end) of a 16 kHz mono file.

    Args:
        path: a file in any format that libsndfile knows by its content (FLAC, WAV, Ogg, MP3).
        start, stop: in samples, 0 <= start < stop.

    Returns:
        float32 array [samples], exactly stop - start of them.

    Raises:
        InputError: the file is missing, unreadable, empty or shorter than asked for, has another
            rate or several channels, or holds samples that are not finite.
    """
    with _opened(path) as file:
        _check_format(path, file)
        stop = file.frames if stop is None else stop
        if stop > file.frames:
            raise InputError(f"{path}: has {file.frames} samples, {stop} were asked for; prepare again")
        if start:  # a file that is cut off cannot even seek to its beginning, and says less about it
            file.seek(start)
        samples = file.read(stop - start, dtype="float32")
    if len(samples) != stop - start:
        raise InputError(f"{path}: breaks off at sample {start + len(samples)} of {stop}; replace it")
    return _finite(path, samples)


def read_any_audio(path):
    """Read a whole file of any rate and any number of channels; `.gsm` is raw GSM 06.10.

    Returns:
        float32 array [samples], the mean of the channels, and the rate in Hz.

    Raises:
        InputError: the file is missing, unreadable or empty, breaks off, or holds samples that are not
            finite.
    """
    with _opened(path) as file:
        return np.concatenate([block.mean(axis=1) for block in _blocks(path, file)]), file.samplerate


def count_samples(path):
    """Read a 16 kHz mono file to its end, a minute at a time, and return its samples.

    Raises:
        InputError: as read_audio.
    """
    with _opened(path) as file:
        _check_format(path, file)
        return sum(len(block) for block in _blocks(path, file))


@contextmanager
def _opened(path):
    """Open an audio file that has samples; what libsndfile complains about becomes an InputError."""
    # Telephony's GSM files have no header to say what they are.
    raw = {"samplerate": 8_000, "channels": 1, "format": "RAW", "subtype": "GSM610"}
    try:
        os.stat(path)  # libsndfile does not tell a missing file from others
        with soundfile.SoundFile(path, **(raw if str(path).endswith(".gsm") else {})) as file:
            if file.frames < 1:
                raise InputError(f"{path}: has no samples; replace or remove it")
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(".").lower()
        raise InputError(f"{path}: cannot be read as audio ({reason}); replace or remove it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error


def _blocks(path, file):
    """Yield a file's samples in pieces of [samples, channels].

    A damaged header can promise more samples than there is memory for.
    """
    count = 0
    while len(block := file.read(max(BLOCK // file.channels, 1), dtype="float32", always_2d=True)):
        count += len(block)
        yield _finite(path, block)
    if not count or count < file.frames and file.format != "MP3":  # whose header need not tell the length
        raise InputError(f"{path}: breaks off at sample {count} of {file.frames}; replace or remove it")


def _check_format(path, file):
    if file.samplerate != SAMPLE_RATE or file.channels != 1:
        raise InputError(
            f"{path}: has {file.samplerate} Hz and {file.channels} channel(s) instead of"
            f" {SAMPLE_RATE} Hz mono; prepare it with scripts/prepare_speech.py"
        )


def _finite(path, samples):
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: holds samples that are not finite; replace or remove it")
    return samples
