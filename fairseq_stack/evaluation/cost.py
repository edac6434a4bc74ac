"""The cost of an upstream: parameters, multiply-adds, and time on this machine's CPU."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.evaluation.upstreams import OnnxUpstream, TeacherUpstream, is_onnx, load_export
from fairseq_stack.tables import markdown_table

SECONDS = 10  # length of the measured utterance; the cost of attention grows with its square


def count_parameters(upstream: nn.Module) -> int:
    """Returns the number of the model's parameters, which is 0 for log-mel."""
    if isinstance(upstream, OnnxUpstream):
        return upstream.parameter_count
    return sum(parameter.numel() for parameter in upstream.parameters())


@torch.no_grad()
def multiply_adds(upstream: nn.Module, seconds: int = SECONDS) -> float | None:
    """Returns the multiply-adds per second of audio, on one utterance. None for an ONNX file, which torch cannot count.

    torch's FlopCounterMode counts convolutions, matrix products and attention, with two operations per multiply-add.
    It does not count norms, activations, softmax and Fourier transforms.

    Args:
        upstream: a module with the interface of S3PRLUpstream.
        seconds: length of the utterance.
    """
    if isinstance(upstream, OnnxUpstream):
        return None
    waveform = _noise(seconds)
    # The counter does not know the CPU's fused attention. SDPBackend.MATH computes attention by matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        upstream(waveform, torch.tensor([waveform.size(1)]))
    return counter.get_total_flops() / 2 / seconds


def real_time_factor(upstream: nn.Module) -> float:
    """Returns the seconds of computation per second of audio, on one utterance: the median of several runs."""
    (factors,) = real_time_factors([upstream])
    return statistics.median(factors)


@torch.no_grad()
def real_time_factors(upstreams: Sequence[nn.Module], seconds: int = SECONDS, runs: int = 7) -> list[list[float]]:
    """Returns for each upstream its seconds of computation per second of audio in each run, on one utterance.

    In a run the upstreams compute one after the other. So other work on the machine hardly changes their ratio. A
    first run, which warms up, does not count.

    Args:
        upstreams: modules with the interface of S3PRLUpstream.
        seconds: length of the utterance.
        runs: number of runs.
    """
    waveform = _noise(seconds)
    lengths = torch.tensor([waveform.size(1)])
    factors = [[] for _ in upstreams]
    for run in range(runs + 1):
        for upstream, found in zip(upstreams, factors):
            begin = time.perf_counter()
            upstream(waveform, lengths)
            if run > 0:
                found.append((time.perf_counter() - begin) / seconds)
    return factors


def _noise(seconds):
    return 0.1 * torch.randn(1, seconds * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))


def cost_table(exports: Sequence[str | Path], teacher: str | Path | None, seconds: int, runs: int) -> str:
    """Returns the sizes and real-time factors of exports, and of a teacher, beside those of the first export.

    The fastest run of each counts, because other work on the machine can only slow a run down.

    Args:
        exports: see load_export; ONNX files with any outputs.
        teacher: see load_teacher, or None.
        seconds: length of the utterance that all compute.
        runs: number of timed runs.

    Raises:
        InputError: one of them cannot be loaded.
    """
    # An ONNX file needs no hidden states here.
    upstreams = {str(path): OnnxUpstream(path) if is_onnx(path) else load_export(path) for path in exports}
    sizes = {str(path): _bytes(Path(path)) for path in exports}
    if teacher:
        upstreams["teacher"] = TeacherUpstream(teacher)
        sizes["teacher"] = 4 * count_parameters(upstreams["teacher"])  # its file may hold the state of a training
    factors = dict(zip(upstreams, real_time_factors(list(upstreams.values()), seconds, runs)))
    first = str(exports[0])
    rows = []
    for name, found in factors.items():
        rows.append(
            (
                name,
                f"{count_parameters(upstreams[name]) / 1e6:.2f}",
                f"{sizes[name] / 1e6:.2f}",
                f"{sizes[name] / sizes[first]:.2f}",
                f"{min(found):.4f}",
                f"{min(found) / min(factors[first]):.2f}",
            )
        )
    return markdown_table(("model", "M parameters", "MB", "of the first", "real-time factor", "of the first"), rows)


def _bytes(path: Path) -> int:
    """The size of a file, or of the weights in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
