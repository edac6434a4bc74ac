"""Whisper's encoder as a teacher, with log-mel spectrograms of the recordings' true lengths."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import frames_from_samples, parse_conv_layers
from fairseq_stack.teachers.base import Teacher, exact_fp32

WINDOW, HOP = 400, 160  # samples, of every Whisper
# Frames are counted as HuBERT counts them, so that a student with the usual strides makes as many.
FRAMES = parse_conv_layers("[(1,10,5)] + [(1,3,2)] * 4 + [(1,2,2)] * 2")


class WhisperTeacher(Teacher):
    """transformers' WhisperEncoder on recordings of up to 30 s.

    Whisper was trained on recordings that were padded with silence to 30 s. By default the teacher
    computes only the true length: 2.5 times less for the 12 s of an average LibriSpeech utterance. Each
    frame has the same position as in the padded input. With `pad` the teacher pads to 30 s.

    Whisper makes 50 frames a second, like HuBERT, and up to one more at the end, which is cut off.
    Its frame i is centred on sample 320 i, and HuBERT's on sample 320 i + 200. So a frame of a student
    with HuBERT's shape sees 12.5 ms further, a bit more than half a frame.

    Args:
        name: the folder.
        model: transformers' WhisperEncoder, loaded.
        pad: whether to pad to the length of the pre-training.
    """

    family = "Whisper's encoder"
    longest: int
    model: Any  # transformers' WhisperEncoder, whose attributes torch declares as Tensor | Module

    def __init__(self, name: str, model: WhisperEncoder, pad: bool = False) -> None:
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

    def frames(self, samples: int) -> int:
        if samples > self.longest:
            raise InputError(
                f"task.teacher={self.name} takes at most {self.longest} samples, but got"
                f" {samples}; set task.max_sample_size to {self.longest} or less"
            )
        return frames_from_samples(samples, self.conv_layers)

    @torch.no_grad()
    @exact_fp32()
    def hidden_states(self, waveforms: Tensor, lengths: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        count = self.frames(waveforms.size(1))
        self.model.to(waveforms.device)
        self.filters = self.filters.to(waveforms.device)
        waveforms = waveforms.float()
        if self.pad:
            waveforms = F.pad(waveforms, (0, self.longest - waveforms.size(1)))
            lengths = torch.full_like(lengths, self.longest)

        # Before every convolution, what follows the end of an utterance is zero, as if the utterance were alone.
        mel_frames = lengths // HOP
        x = log_mel(waveforms, lengths, self.filters).to(self.dtype)
        x = F.gelu(self.model.conv1(x))
        x = F.gelu(self.model.conv2(x * _valid(x, mel_frames)[:, None])).transpose(1, 2)
        x = x + self.model.embed_positions.weight[: x.size(1)]
        frames, mask = (mel_frames + 1) // 2, None
        if int(frames.min()) < x.size(1):
            valid = _valid(x.transpose(1, 2), frames)
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


def log_mel(waveforms: Tensor, lengths: Tensor, filters: Tensor) -> Tensor:
    """Return the log-mel spectrogram that transformers' WhisperFeatureExtractor makes of each utterance alone.

    The waveform is mirrored at its ends. Values more than 80 dB below the utterance's own maximum are raised to
    that level.

    Args:
        waveforms: [B, S], samples at 16 kHz.
        lengths: [B], samples; more than half a window, 200.
        filters: [mel bands, 201].

    Returns:
        [B, mel bands, S // 160]; zeros after the lengths // 160 frames of an utterance.
    """
    ahead = torch.arange(WINDOW // 2, device=waveforms.device)
    end = lengths.to(waveforms.device, non_blocking=True)[:, None]
    padded = F.pad(F.pad(waveforms[:, None], (WINDOW // 2, 0), mode="reflect")[:, 0], (0, WINDOW // 2))
    padded = padded.scatter(1, end + ahead + WINDOW // 2, waveforms.gather(1, end - 2 - ahead))
    window = torch.hann_window(WINDOW, device=waveforms.device)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True)
    power = spectrum[..., : waveforms.size(1) // HOP].abs().square()
    x = (filters @ power).clamp(min=1e-10).log10()
    valid = _valid(x, lengths // HOP)[:, None]
    loudest = x.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(x, loudest - 8.0) + 4.0) / 4.0 * valid


def _valid(x: Tensor, frames: Tensor) -> Tensor:
    """Return a mask [B, T] for [B, C, T], true on the first frames[b] frames of each row."""
    return (torch.arange(x.size(2)) < frames.cpu()[:, None]).to(x.device, non_blocking=True)
