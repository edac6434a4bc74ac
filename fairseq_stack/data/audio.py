"""Reads speech from files: 16 kHz mono, which every teacher expects."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from fairseq_stack.errors import InputError

SAMPLE_RATE = 16_000  # Hz; HuBERT, wav2vec 2.0, WavLM and Whisper all take this rate
BLOCK = 60 * SAMPLE_RATE  # samples of all channels together
SHORTEST = 400  # samples of one frame of these models
# Full scale is 1. Decoders and resamplers overshoot it by up to a third for speech, and loud noise through Opus can
# reach 2.3. Samples beyond LOUDEST were never scaled: integers of 16 bits written as floats, or waveforms of unit
# variance.
LOUDEST = 4.0
CANCELLED = 0.05  # smallest share of the power that unrelated channels would keep in their mean


def read_audio(path: str | Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Read the samples `start` to `stop` (exclusive; None means the end) of a 16 kHz mono file.

    Args:
        path: a file in any format that libsndfile recognizes by its content (FLAC, WAV, Ogg, MP3).
        start, stop: in samples, 0 <= start < stop.

    Returns:
        float32 array [samples], exactly stop - start of them.

    Raises:
        InputError: the file is missing, unreadable, empty or shorter than `stop`, has another rate or
            several channels, or holds samples that are not finite or far beyond full scale.
    """
    with _opened(path) as file:
        _check_format(path, file)
        end: int = file.frames if stop is None else stop
        if end > file.frames:
            raise InputError(f"{path}: has {file.frames} samples, {end} were asked for; prepare again")
        if start:  # in a file that is cut off, a seek to its beginning fails too, with a less clear error
            file.seek(start)
        samples = file.read(end - start, dtype="float32")
    if len(samples) != end - start:
        raise InputError(f"{path}: breaks off at sample {start + len(samples)} of {end}; replace it")
    return _checked(path, samples)


def any_audio(path: str | Path) -> tuple[int, Iterator[np.ndarray]]:
    """Open a file of any rate and any number of channels; `.gsm` is raw GSM 06.10.

    Returns:
        the rate in Hz, and an iterator of the samples: float32 blocks [samples], the mean of the channels.

    Raises:
        InputError: at once or from the iterator. The file is missing, unreadable or empty, breaks off, holds
            samples that are not finite or far beyond full scale, or its channels cancel each other.
    """

    def read() -> Iterator[Any]:
        with _opened(path) as file:
            yield file.samplerate
            yield from _mixed(path, file)

    rate_and_blocks = read()
    return next(rate_and_blocks), rate_and_blocks


def count_samples(path: str | Path) -> int:
    """Read a 16 kHz mono file to its end, a minute at a time, and return the number of its samples.

    Raises:
        InputError: as read_audio.
    """
    with _opened(path) as file:
        _check_format(path, file)
        return sum(len(block) for block in _blocks(path, file))


@contextmanager
def _opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open an audio file that has samples; libsndfile's errors become InputErrors."""
    # Telephony's GSM files have no header that gives their format.
    raw = {"samplerate": 8_000, "channels": 1, "format": "RAW", "subtype": "GSM610"}
    try:
        os.stat(path)  # libsndfile has no error of its own for a missing file
        # As bytes, because a name need not be UTF-8.
        name = os.fsencode(path)
        with soundfile.SoundFile(name, **(raw if str(path).lower().endswith(".gsm") else {})) as file:  # pyright: ignore[reportArgumentType] soundfile takes bytes, too
            if file.frames < 1:
                raise InputError(f"{path}: has no samples; replace or remove it")
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(".").lower()
        raise InputError(f"{path}: cannot be read as audio ({reason}); replace or remove it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error
    except TypeError as error:  # soundfile raises it for the suffix .raw
        raise InputError(f"{path}: has no header that gives its rate; write it again as WAV or FLAC") from error


def _blocks(path: str | Path, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield a file's samples in blocks [samples, channels].

    A damaged header can announce more samples than fit into memory.
    """
    count = 0
    while len(block := file.read(max(BLOCK // file.channels, 1), dtype="float32", always_2d=True)):
        count += len(block)
        yield _checked(path, block)
    if not count or count < file.frames and file.format != "MP3":  # an MP3 header need not give the length
        raise InputError(f"{path}: breaks off at sample {count} of {file.frames}; replace or remove it")


def _mixed(path: str | Path, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield the mean of a file's channels in blocks."""
    before = after = 0.0
    for block in _blocks(path, file):
        mean = block.mean(axis=1)
        before += np.square(block, dtype=np.float64).sum()
        after += np.square(mean, dtype=np.float64).sum()
        yield mean
    if after * file.channels**2 < CANCELLED * before:
        raise InputError(
            f"{path}: its channels cancel each other, because one is another with its sign changed; keep one of them"
        )


def _check_format(path: str | Path, file: soundfile.SoundFile) -> None:
    if file.samplerate != SAMPLE_RATE or file.channels != 1:
        raise InputError(
            f"{path}: has {file.samplerate} Hz and {file.channels} channel(s) instead of"
            f" {SAMPLE_RATE} Hz mono; prepare it with fairseq-stack prepare"
        )


def _checked(path: str | Path, samples: np.ndarray) -> np.ndarray:
    peak = np.abs(samples).max()
    if not np.isfinite(peak):
        raise InputError(f"{path}: holds samples that are not finite; replace or remove it")
    if peak > LOUDEST:
        raise InputError(
            f"{path}: holds samples up to {peak:g}, but full scale is 1; divide them by the full scale of their"
            " original format (32768 for 16 bits)"
        )
    return samples
