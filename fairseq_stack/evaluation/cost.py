"""The cost of an upstream: parameters, multiply-adds, and time on this machine's CPU."""

import statistics
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_stack.data.audio import SAMPLE_RATE

SECONDS = 10  # length of the measured utterance; the cost of attention grows with its square


def count_parameters(upstream: nn.Module) -> int:
    """Returns the number of the model's parameters, which is 0 for log-mel."""
    return sum(parameter.numel() for parameter in upstream.parameters())


@torch.no_grad()
def multiply_adds(upstream: nn.Module, seconds: int = SECONDS) -> float:
    """Returns the multiply-adds per second of audio, on one utterance.

    torch's FlopCounterMode counts convolutions, matrix products and attention, with two operations per multiply-add.
    It does not count norms, activations, softmax and Fourier transforms.

    Args:
        upstream: a module with the interface of S3PRLUpstream.
        seconds: length of the utterance.
    """
    waveform = _noise(seconds)
    # The counter does not know the CPU's fused attention. SDPBackend.MATH computes attention by matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        upstream(waveform, torch.tensor([waveform.size(1)]))
    return counter.get_total_flops() / 2 / seconds


@torch.no_grad()
def real_time_factor(upstream: nn.Module, seconds: int = SECONDS, runs: int = 7) -> float:
    """Returns the seconds of computation per second of audio, on one utterance.

    It is the median of `runs` after a first run that warms up.
    """
    waveform = _noise(seconds)
    lengths = torch.tensor([waveform.size(1)])
    upstream(waveform, lengths)
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        upstream(waveform, lengths)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / seconds


def _noise(seconds):
    return 0.1 * torch.randn(1, seconds * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
