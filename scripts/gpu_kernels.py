"""Compare our convolutions for a GPU with torch's own, side by side: python scripts/gpu_kernels.py

The table has the median milliseconds of one call on utterances of 12 s.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from fairseq_stack.models.conv_extractor import normed_convolution
from fairseq_stack.models.pos_conv import blockwise_convolution
from fairseq_stack.tables import markdown_table

GROUPS, TAPS = 16, 128  # of HuBERT's positional convolution
WIDTHS = (768, 384)  # features of the teacher and of the student
SAMPLES, FRAMES = 192_000, 599  # of 12 s
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def milliseconds(function, *tensors, backward):
    """The median time of a call, with its backward pass if `backward`."""
    tensors = [tensor.detach().requires_grad_(backward) for tensor in tensors]
    upstream = torch.randn_like(function(*tensors))

    def call():
        y = function(*tensors)
        if backward:
            torch.autograd.grad(y, tensors, upstream)

    return 1e3 * Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median


def torchs_convolution(x, weight, padding, groups):
    return F.conv1d(x.transpose(1, 2), weight, None, 1, padding, 1, groups).transpose(1, 2)


def positional(width, dtype, batch, device):
    x = torch.randn(batch, FRAMES, width, device=device, dtype=dtype)
    weight = 0.01 * torch.randn(width, width // GROUPS, TAPS, device=device, dtype=dtype)
    for backward in (False, True):
        name = f"positional convolution, {width} features, {'forward and backward' if backward else 'forward'}"
        yield (
            name,
            *(
                milliseconds(lambda x, w, f=function: f(x, w, TAPS // 2, GROUPS), x, weight, backward=backward)
                for function in (torchs_convolution, blockwise_convolution)
            ),
        )


def first(dtype, batch, device):
    waveforms = torch.randn(batch, SAMPLES, device=device)
    frames = torch.full((batch,), (SAMPLES - 10) // 5 + 1)
    conv = torch.nn.Conv1d(1, 512, 10, 5, bias=False).to(device, dtype)
    norm = torch.nn.GroupNorm(512, 512).to(device, dtype)
    yield (
        "first convolution and its norm, forward",
        milliseconds(lambda x: norm(conv(x[:, None].to(dtype))), waveforms, backward=False),
        milliseconds(lambda x: normed_convolution(x, frames, conv, norm), waveforms, backward=False),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="utterances (default: 64)")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.precision:
        dtype = DTYPES[name]
        cases = [case for width in WIDTHS for case in positional(width, dtype, args.batch, device)]
        cases += first(dtype, args.batch, device)
        rows += [[case, name, f"{torchs:.2f}", f"{ours:.2f}", f"{torchs / ours:.1f}x"] for case, torchs, ours in cases]
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    print(markdown_table([where, "precision", "torch, ms", "ours, ms", "ratio"], rows))


if __name__ == "__main__":
    main()
