"""Audio comes as 16 kHz mono float32, exactly the samples asked for, or not at all."""

import numpy as np
import pytest
import soundfile

from fairseq_stack.data.audio import SAMPLE_RATE, any_audio, read_audio
from fairseq_stack.errors import InputError


def read_any_audio(path):
    """The samples of a whole file and their rate."""
    rate, blocks = any_audio(path)
    return np.concatenate(list(blocks)), rate


INTEGERS = np.array([0, 1, -1, 16384, -32768, 32767, 8192, -4096], dtype=np.int16)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_samples_are_the_stored_integers_over_32768(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", INTEGERS, SAMPLE_RATE)
    samples = read_audio(tmp_path / f"a.{suffix}")
    assert samples.dtype == np.float32 and samples.shape == (8,)
    assert samples.tolist() == [0, 2**-15, -(2**-15), 0.5, -1, 1 - 2**-15, 0.25, -0.125]


@pytest.mark.parametrize("start, stop", [(0, 1), (3, 4097), (30_000, 40_000), (39_999, 40_000), (5, None)])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_span_is_a_slice_of_the_whole(tmp_path, suffix, start, stop):
    integers = np.random.default_rng(1).integers(-(2**15), 2**15, 40_000, dtype=np.int16)
    soundfile.write(tmp_path / f"a.{suffix}", integers, SAMPLE_RATE)
    samples = read_audio(tmp_path / f"a.{suffix}", start, stop)
    np.testing.assert_array_equal(samples, integers[start:stop] / 32768)


def test_a_span_beyond_the_end_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", INTEGERS, SAMPLE_RATE)
    with pytest.raises(InputError, match=r"a\.wav: has 8 samples, 9 were asked for"):
        read_audio(tmp_path / "a.wav", 2, 9)


def test_unusable_files_are_named(tmp_path):
    silence = np.zeros(100)
    soundfile.write(tmp_path / "rate.wav", silence, 44_100)
    soundfile.write(tmp_path / "stereo.flac", np.zeros((100, 2)), SAMPLE_RATE)
    soundfile.write(tmp_path / "empty.wav", silence[:0], SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", [0, np.nan], SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "infinite.wav", [np.inf, 0], SAMPLE_RATE, subtype="FLOAT")
    (tmp_path / "nothing.wav").touch()
    (tmp_path / "text.flac").write_text("words")
    (tmp_path / "folder.wav").mkdir()
    expected = {
        "rate.wav": "has 44100 Hz and 1 channel.* fairseq-stack prepare",
        "stereo.flac": "has 16000 Hz and 2 channel.* fairseq-stack prepare",
        "empty.wav": "has no samples",
        "nan.wav": "not finite",
        "infinite.wav": "not finite",
        "nothing.wav": "cannot be read as audio",
        "text.flac": "cannot be read as audio",
        "folder.wav": "cannot be read",
        "absent.wav": "cannot be read .No such file",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            read_audio(tmp_path / name)


def test_any_audio_is_the_mean_of_its_channels_at_its_own_rate(tmp_path):
    channels = np.array([[0.5, 0.25, -0.25], [1 / 4, -1 / 2, 1 / 4]])
    soundfile.write(tmp_path / "a.wav", channels, 44_100, subtype="FLOAT")
    samples, rate = read_any_audio(tmp_path / "a.wav")
    assert rate == 44_100 and samples.dtype == np.float32
    np.testing.assert_allclose(samples, [0.5 / 3, 0], atol=1e-7)


def test_an_mp3_that_promises_samples_and_has_none_is_named(tmp_path):
    soundfile.write(tmp_path / "a.mp3", 0.1 * np.random.default_rng(0).standard_normal(3000), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    content[139:203] = b"\x7f" * 64  # where LAME keeps its own header
    (tmp_path / "a.mp3").write_bytes(content)
    with soundfile.SoundFile(tmp_path / "a.mp3") as file:
        assert file.frames > 0
    with pytest.raises(InputError, match=r"a\.mp3: breaks off at sample 0"):
        read_any_audio(tmp_path / "a.mp3")


@pytest.mark.parametrize(
    "scale, message", [(1.0, None), (2.3, None), (5.0, "up to 5"), (2**15, "up to 32768"), (2**31, "up to 2.1")]
)
def test_floats_far_beyond_full_scale_are_refused_and_an_overshoot_is_kept(tmp_path, scale, message):
    samples = scale * np.sin(np.arange(1001) * np.pi / 20)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    for read in (read_audio, lambda path: read_any_audio(path)[0]):
        if message:
            with pytest.raises(
                InputError, match=rf"a\.wav: holds samples {message}.*, but full scale is 1; divide them"
            ):
                read(tmp_path / "a.wav")
        else:
            np.testing.assert_allclose(read(tmp_path / "a.wav"), samples, atol=1e-6)


def test_channels_that_cancel_each_other_are_no_silence(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 3000))
    others = {"a": -noise[0], "b": noise[1], "c": 0 * noise[0], "d": noise[0]}
    for name, other in others.items():
        soundfile.write(tmp_path / f"{name}.wav", np.stack([noise[0], other], axis=1), SAMPLE_RATE)
        if name == "a":
            with pytest.raises(InputError, match=r"a\.wav: its channels cancel each other"):
                read_any_audio(tmp_path / f"{name}.wav")
        else:
            assert len(read_any_audio(tmp_path / f"{name}.wav")[0]) == 3000
    soundfile.write(tmp_path / "e.wav", np.zeros((3000, 2)), SAMPLE_RATE)
    assert not read_any_audio(tmp_path / "e.wav")[0].any()


def test_a_file_without_header_is_named(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(3200))
    with pytest.raises(InputError, match=r"a\.raw: has no header"):
        read_audio(tmp_path / "a.raw")


def test_headerless_gsm_is_telephone_speech_at_8_khz(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 400 * np.arange(1600) / 8000)
    soundfile.write(tmp_path / "a.gsm", tone, 8_000, format="RAW", subtype="GSM610")
    assert (tmp_path / "a.gsm").stat().st_size == 330  # ten frames of 33 bytes
    samples, rate = read_any_audio(tmp_path / "a.gsm")
    assert rate == 8_000 and len(samples) == 1600
    assert np.corrcoef(samples[160:], tone[160:])[0, 1] > 0.95  # lossy
