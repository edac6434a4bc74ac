"""Speech from files: 16 kHz mono, as every teacher here expects it."""

import numpy as np
import soundfile

from fairseq_stack.errors import InputError

SAMPLE_RATE = 16_000  # Hz; HuBERT, wav2vec 2.0, WavLM and Whisper all take this rate


def read_audio(path, start=0, stop=None):
    """Read the samples `start` to `stop` (exclusive; None means the end) of a 16 kHz mono file.

    Args:
        path: any format that libsndfile reads (FLAC, WAV, Ogg, MP3).
        start, stop: in samples, 0 <= start < stop.

    Returns:
        float32 array [samples], exactly stop - start of them.

    Raises:
        InputError: the file is unreadable, empty or shorter than asked for, has another rate or
            several channels, or holds samples that are not finite.
    """
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != SAMPLE_RATE or file.channels != 1:
                raise InputError(
                    f"{path}: {file.samplerate} Hz, {file.channels} channel(s) instead of {SAMPLE_RATE} Hz mono;"
                    f" prepare it with scripts/prepare_speech.py"
                )
            if file.frames == 0:
                raise InputError(f"{path}: has no samples; remove it or prepare the speech again")
            stop = file.frames if stop is None else stop
            if stop > file.frames:
                raise InputError(f"{path}: has {file.frames} samples, {stop} were asked for; check its manifest")
            file.seek(start)
            samples = file.read(stop - start, dtype="float32")
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: cannot be read as audio ({_reason(error)}); replace or remove it") from error
    if len(samples) != stop - start:
        raise InputError(f"{path}: ends at sample {start + len(samples)} of {stop}; replace or remove it")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: holds samples that are not finite; replace or remove it")
    return samples


def _reason(error):
    """libsndfile's own words without the path, which the message already has."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
