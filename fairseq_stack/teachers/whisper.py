"""Whisper's encoder as a teacher: log-mel from the waveform, at the recording's true length."""

import inspect

import torch
import torch.nn.functional as F
from transformers import WhisperFeatureExtractor

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import frames_from_samples, parse_conv_layers
from fairseq_stack.teachers.base import Teacher, exact_fp32

WINDOW, HOP = 400, 160  # samples, of every Whisper
# Frames are counted as HuBERT counts them, so that a student of the usual strides fits.
FRAMES = parse_conv_layers("[(1,10,5)] + [(1,3,2)] * 4 + [(1,2,2)] * 2")


class WhisperTeacher(Teacher):
    """transformers' WhisperEncoder on recordings of up to 30 s.

    Whisper was trained on recordings padded with silence to 30 s. By default only the true length
    runs: for the 12 s of an average LibriSpeech utterance that is 2.5 times less work, and the
    positions are those that the same frames have in the padded input. `pad` gives it its 30 s.

    Whisper makes 50 frames a second, as HuBERT does, and up to one more at the end, which is cut.
    Its frame i is centred on sample 320 i, HuBERT's on sample 320 i + 200: a student of HuBERT's
    shape sees 12.5 ms, a bit more than half a frame, further.

    Args:
        name: the folder.
        model: transformers' WhisperEncoder, loaded.
        pad: whether to pad to the length of the pre-training.
    """

    family = "Whisper's encoder"

    def __init__(self, name, model, pad=False):
        self.name = name
        self.model = model
        self.pad = pad
        self.depth = len(model.layers)
        self.width = model.config.d_model
        self.conv_layers = FRAMES
        self.longest = 2 * model.config.max_source_positions * HOP
        filters = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).mel_filters
        self.filters = torch.from_numpy(filters).float().T
        # Required by transformers 4, unknown to transformers 5.
        head_mask = "layer_head_mask" in inspect.signature(model.layers[0].forward).parameters
        self.layer_options = {"layer_head_mask": None} if head_mask else {}

    def frames(self, samples):
        if samples > self.longest:
            raise InputError(
                f"task.teacher={self.name} takes at most {self.longest} samples, but was to take"
                f" {samples}; set task.max_sample_size to {self.longest} or less"
            )
        return frames_from_samples(samples, self.conv_layers)

    @torch.no_grad()
    @exact_fp32()
    def hidden_states(self, waveforms, lengths, layers):
        count = self.frames(waveforms.size(1))
        self.model.to(waveforms.device)
        self.filters = self.filters.to(waveforms.device)
        waveforms = waveforms.float()
        if self.pad:
            waveforms = F.pad(waveforms, (0, self.longest - waveforms.size(1)))
            lengths = torch.full_like(lengths, self.longest)

        # As if each utterance were alone: zeros behind its end in front of every convolution.
        mel_frames = lengths // HOP
        x = log_mel(waveforms, lengths, self.filters).to(self.dtype)
        x = F.gelu(self.model.conv1(x))
        x = F.gelu(self.model.conv2(x * _valid(x, mel_frames)[:, None])).transpose(1, 2)
        x = x + self.model.embed_positions.weight[: x.size(1)]
        valid = _valid(x.transpose(1, 2), (mel_frames + 1) // 2)
        mask = None
        if not bool(valid.all()):
            mask = torch.where(valid, 0.0, torch.finfo(x.dtype).min).to(x.dtype)[:, None, None]
            mask = mask.expand(-1, -1, x.size(1), -1)  # [B, 1, T, T], added to the attention's scores

        outputs = {0: x[:, :count]} if 0 in layers else {}
        for number, layer in enumerate(self.model.layers[: max(layers)], start=1):
            x = layer(x, attention_mask=mask, **self.layer_options)
            x = x[0] if isinstance(x, tuple) else x
            if number in layers:
                last = number == self.depth
                outputs[number] = (self.model.layer_norm(x) if last else x)[:, :count]
        return outputs


def log_mel(waveforms, lengths, filters):
    """Whisper's log-mel of each utterance alone, as transformers' WhisperFeatureExtractor makes it.

    The spectrogram mirrors the waveform at its ends, and the dynamic range is cut to 80 dB below the
    utterance's own maximum.

    Args:
        waveforms: [B, S], samples at 16 kHz.
        lengths: [B], samples; more than half a window, 200.
        filters: [mel bands, 201].

    Returns:
        [B, mel bands, S // 160]; zeros behind the lengths // 160 frames of an utterance.
    """
    ahead = torch.arange(WINDOW // 2, device=waveforms.device)
    end = lengths[:, None]
    padded = F.pad(F.pad(waveforms[:, None], (WINDOW // 2, 0), mode="reflect")[:, 0], (0, WINDOW // 2))
    padded = padded.scatter(1, end + ahead + WINDOW // 2, waveforms.gather(1, end - 2 - ahead))
    window = torch.hann_window(WINDOW, device=waveforms.device)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True)
    power = spectrum[..., : waveforms.size(1) // HOP].abs().square()
    x = (filters @ power).clamp(min=1e-10).log10()
    valid = _valid(x, lengths // HOP)[:, None]
    loudest = x.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(x, loudest - 8.0) + 4.0) / 4.0 * valid


def _valid(x, frames):
    """[B, T], true on the first frames[b] frames of [B, C, T]."""
    return torch.arange(x.size(2), device=x.device) < frames[:, None]
