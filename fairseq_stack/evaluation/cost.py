"""What an upstream costs: parameters, multiply-adds, and time on this machine's CPU."""

import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_stack.data.audio import SAMPLE_RATE

SECONDS = 10  # of the utterance that is measured: attention grows with its square


def count_parameters(upstream):
    """Numbers in the model's parameters. Log-mel has none."""
    return sum(parameter.numel() for parameter in upstream.parameters())


@torch.no_grad()
def multiply_adds(upstream, seconds=SECONDS):
    """Multiply-adds per second of audio, on one utterance.

    Counted by torch's FlopCounterMode, which knows convolutions, matrix products and attention, and calls a
    multiply-add two operations. Norms, activations, softmax and Fourier transforms are not counted.

    Args:
        upstream: an S3PRLUpstream, or what has its interface.
        seconds: length of the utterance.
    """
    waveform = _noise(seconds)
    # The counter does not know the CPU's fused attention; written out, it consists of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        upstream(waveform, torch.tensor([waveform.size(1)]))
    return counter.get_total_flops() / 2 / seconds


@torch.no_grad()
def real_time_factor(upstream, seconds=SECONDS, runs=7):
    """Seconds of computing per second of audio, on one utterance: the median of `runs` after a first one."""
    waveform = _noise(seconds)
    lengths = torch.tensor([waveform.size(1)])
    upstream(waveform, lengths)
    spent = []
    for _ in range(runs):
        begin = time.perf_counter()
        upstream(waveform, lengths)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent) / seconds


def _noise(seconds):
    return 0.1 * torch.randn(1, seconds * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
