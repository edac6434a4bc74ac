"""A lower bound of the time that a GPU needs for an update: a roofline of the real training on a pretended GPU.

The training runs unchanged, but its tensors have only shapes. Each kernel takes at least the time to move its bytes at
the GPU's bandwidth, the time for its products at the GPU's rate, and the time of a launch. Their maximum is the bound
of a kernel. The sum over all kernels is a bound, no measurement: real kernels are slower, the CPU may be slower, and
caches may save some of the bytes.
"""

import json
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from fairseq_stack.benchmark.baselines import BASELINES
from fairseq_stack.benchmark.clock import Clock
from fairseq_stack.benchmark.inputs import make_inputs
from fairseq_stack.benchmark.measure import DEPTHS, growing
from fairseq_stack.benchmark.ours import LIVE, Case, Ours, fill_store
from fairseq_stack.benchmark.pretended_attention import chosen_kernel
from fairseq_stack.benchmark.pretended_gpu import (
    INDEXING,
    WITHOUT_KERNEL,
    Machine,
    OnGpu,
    added_mask,
    aten,
    launches,
    pretended_gpu,
)
from fairseq_stack.errors import InputError
from fairseq_stack.tables import markdown_table
from fairseq_stack.teachers.base import fp32_switches

# Of the recipe librispeech_base.
RECIPE_UPDATES, RECIPE_BATCH = 329_625, 64

# These do not read their arguments: they overwrite them or use only their shapes.
WRITING_ALONE = (
    aten.fill_, aten.zero_, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_full,
)  # fmt: skip

# The entries of Shapes.counted, in this order.
COUNTS = ("seconds", "launches", "waits", "flops", "bytes")

LINES = 12  # of the code, in a table


@dataclass(frozen=True)
class Gpu:
    """The rates that large kernels reach on a GPU.

    Attributes:
        bandwidth: of its memory, in bytes per second.
        half, tf32, fp32: of matrix products, in floating-point operations per second.
        attention: of fused attention in half precision, in the same unit.
        launch: seconds from the start of a small kernel to the start of the next.
    """

    bandwidth: float
    half: float
    tf32: float
    fp32: float
    attention: float
    launch: float = 2e-6


# About 90 % of the bandwidth in the data sheets, and about 75 % of their rates in half precision and TF32 without
# sparsity: H100 SXM 3.35 TB/s and 989 TFLOP/s, A100 SXM 80 GB 2.04 and 312, RTX 4090 1.01 and 165. On an H100, the
# CNN's second convolution reached 715 TFLOP/s, and GELU 2.8 TB/s. FlashAttention-2 reaches 282 TFLOP/s forward and 198
# backward there (512 frames, heads of 64 features: Shah et al. 2024, figures 5 and 6), and half of the data sheet's
# rate or more on an A100 (Dao 2023); the RTX 4090 gets half, too.
GPUS = {
    "h100": Gpu(bandwidth=3.0e12, half=740e12, tf32=370e12, fp32=50e12, attention=280e12),
    "a100": Gpu(bandwidth=1.8e12, half=230e12, tf32=115e12, fp32=18e12, attention=156e12),
    "rtx4090": Gpu(bandwidth=0.9e12, half=125e12, tf32=62e12, fp32=60e12, attention=82e12),
}
# Flash attention computes heads of other sizes as if they had the next of these numbers of features.
HEAD_SIZES = (32, 64, 96, 128, 192, 256)


def named_gpu(name: str) -> Gpu:
    """Returns the Gpu of a name in GPUS, or of a JSON file with its fields.

    Raises:
        InputError: the name is neither of them, or the file does not hold these fields.
    """
    if name in GPUS:
        return GPUS[name]
    names = [field.name for field in fields(Gpu)]
    try:
        with open(name, encoding="utf-8") as file:
            given = json.load(file)
        gpu = Gpu(**{field: float(value) for field, value in given.items()})
        if min(asdict(gpu).values()) <= 0:
            raise ValueError
        return gpu
    except OSError:
        raise InputError(f"--roofline {name} is none of {', '.join(GPUS)} and no file; give one of them") from None
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"--roofline {name} must hold a JSON object of positive numbers: {', '.join(names)}") from None


class Shapes(Machine):
    """A pretended GPU whose floating-point tensors have only shapes, with a clock for the time of its kernels.

    Integers and masks keep their numbers, so that frames are counted and masked as in the training. A single number
    keeps its value until it is combined with a tensor that has only a shape. If the CPU reads such a tensor, it gets 1
    or True. It gets False from == and !=, with which fairseq looks for infinities and NaN.

    Args:
        gpu: the rates.

    Attributes:
        counted: COUNTS since the beginning; its waits are set by `now`.
        lines: {line of the package: COUNTS without waits} since the beginning.
        held, peak: bytes of the memory in use, now and at most.
    """

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu
        self.counted = np.zeros(len(COUNTS))
        self.lines: defaultdict[str | None, np.ndarray] = defaultdict(lambda: np.zeros(len(COUNTS)))
        self.held = self.peak = 0
        self._storages: set[int] = set()

    def now(self) -> np.ndarray:
        """Returns COUNTS since the beginning, as an array that benchmark.clock.Clock uses as the time."""
        self.counted[COUNTS.index("waits")] = self.waits.total()
        return self.counted.copy()

    def compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operation, as a meta tensor if it has only a shape, and counts its costs."""
        operation = func.overloadpacket
        made: Any
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        if operation is aten._local_scalar_dense and tensors[0].is_meta:
            made = not hasattr(tensors[0], "compared") if tensors[0].dtype == torch.bool else 1.0
        elif operation is aten.copy_ and not args[0].is_meta and args[1].is_meta:
            made = args[0]  # a number keeps its value when a shape is copied to it
        elif operation is aten._to_copy and tensors[0].is_meta and kwargs.get("device") is not None:
            made = torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        elif any(map(_has_shape_alone, tensors)) or not tensors:
            if operation in INDEXING:
                args = (args[0], _counted_out(args[1]), *args[2:])
            shapes, options = tree_map(lambda each: each.to("meta") if torch.is_tensor(each) else each, (args, kwargs))
            if options.get("device") is not None:
                options["device"] = torch.device("meta")
            made = func(*shapes, **options)
            if not tensors and not _is_large(made):
                made = func(*args, **kwargs)
        else:
            made = tree_map(lambda each: each.to("meta") if _has_shape_alone(each) else each, func(*args, **kwargs))
        if operation in (aten.eq, aten.ne):
            made.compared = True
        self.charge(func, tensors, args, kwargs, made)
        for each in tree_iter(made):
            if torch.is_tensor(each):
                self.hold(each)
        return made

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Computes attention by the fused kernel that torch would choose."""
        if not isinstance(query, OnGpu):
            return super().attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        bias = added_mask(attn_mask, query)
        if chosen_kernel(query, key, value, bias) is SDPBackend.FLASH_ATTENTION:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.size(2))
        train = torch.is_grad_enabled()
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, train, dropout_p, is_causal, scale=scale
        )[0]

    def charge(self, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any], made: Any) -> None:
        """Adds the costs of an operation to `counted`."""
        operation = func.overloadpacket
        if func.is_view or operation in WITHOUT_KERNEL:
            return
        given = {id(each): each for each in tensors}.values()
        moved = 0 if operation in WRITING_ALONE else sum(map(_bytes, given))
        moved += sum(_bytes(each) for each in tree_iter(made) if torch.is_tensor(each))
        kernels = launches(args)
        flops, seconds = 0, max(kernels * self.gpu.launch, moved / self.gpu.bandwidth)
        if operation in flop_registry:
            if operation is aten.convolution_backward:
                flops = _backward_flops(*args)
            else:
                flops = flop_registry[operation](*args, **kwargs, out_val=made)
            dtype = next(each.dtype for each in given if each.dtype.is_floating_point)
            name = operation._qualified_op_name
            size = args[0].size(-1)
            computed = next((each for each in HEAD_SIZES if each >= size), size) if "flash" in name else size
            seconds = max(seconds, flops * computed / size / self.rate(name, dtype))
        self.counted += (seconds, kernels, 0, flops, moved)
        self.lines[self.here] += (seconds, kernels, 0, flops, moved)

    def rate(self, operation: str, dtype: torch.dtype) -> float:
        """Returns the floating-point operations per second of a kernel."""
        single = dtype in (torch.float32, torch.float64)
        if "attention" in operation:
            return self.gpu.fp32 / 2 if single else self.gpu.attention
        if dtype == torch.float32:
            convolutions, products = fp32_switches()
            owner, name, _ = convolutions if "conv" in operation else products
            return self.gpu.tf32 if getattr(owner, name) in ("tf32", True) else self.gpu.fp32
        return self.gpu.fp32 / 2 if single else self.gpu.half

    def hold(self, tensor: Any) -> None:
        """Counts a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)
        tensor.storage = storage  # keeps the finalized object alive as long as the tensor

    def _release(self, key, size):
        self._storages.discard(key)
        self.held -= size


def rooflines(
    recipes: Path,
    size: str,
    batch: int,
    seconds: float,
    cases: Sequence[Case],
    baselines: Sequence[str],
    gpu: Gpu,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Bounds an update of our cases and of the baselines.

    Args:
        recipes, size, batch, seconds, cases, baselines: see measure.
        gpu: the rates.

    Returns:
        {name: what `roofline` returns}.
    """
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, size, seconds, utterances=2 * batch * len(DEPTHS))
        inputs = recipes, folder, size, batch, "cuda"
        for case in tqdm(cases, desc="cases"):
            if case.targets != LIVE:
                with pretended_gpu(Shapes(gpu)):  # it stores zeros, which take as long to read
                    fill_store(*inputs, case)
            found[str(case)] = roofline(partial(Ours, *inputs, case), DEPTHS, gpu)
        for name in baselines:
            found[name] = roofline(partial(BASELINES[name], folder, size, batch, seconds, "cuda"), DEPTHS[-1:], gpu)
    return found


def roofline(make: Callable[..., Any], depths: Sequence[int], gpu: Gpu) -> dict[int, dict[str, Any]]:
    """Bounds an update of a training at several depths.

    Args:
        make: called with `clock`; returns an object with the method `update` of benchmark.ours.Ours, on a GPU.
        depths: of the updates.
        gpu: the rates.

    Returns:
        {depth: {"parts": {part: {count: number}}, "lines": {line of the code: {count: number}}, "peak_memory": bytes}},
        with COUNTS of the second update.
    """
    machine = Shapes(gpu)
    found = {}
    with pretended_gpu(machine):
        training = make(clock=Clock(torch.device("cuda"), machine.now))
        for depth in depths:
            training.update(depth)  # the first update also makes the optimiser's moments
            machine.peak = machine.held
            machine.lines.clear()
            parts = training.update(depth)
            longest = sorted(machine.lines, key=lambda line: -machine.lines[line][0])
            found[depth] = {
                "parts": {part: dict(zip(COUNTS, counts.tolist())) for part, counts in parts.items()},
                "lines": {line: dict(zip(COUNTS, machine.lines[line].tolist())) for line in longest},
                "peak_memory": machine.peak,
            }
    return found


def roofline_tables(found: dict[str, dict[int, dict[str, Any]]], size: str, batch: int) -> str:
    """Returns Markdown tables of each update, of its parts and of the LINES longest lines of the code at full depth.

    For the size `paper` there is a table of the paper's recipe, too.

    Args:
        found: from `rooflines`.
        size: of inputs.SIZES.
        batch: utterances of an update.
    """
    titles = ["bound of an update, ms", "TFLOP", "GB moved", "launches", "waits", "peak memory, GiB"]
    updates = []
    for name, by_depth in found.items():
        for depth, figures in by_depth.items():
            total = {count: sum(part[count] for part in figures["parts"].values()) for count in COUNTS}
            updates.append([name, str(depth), *_cells(total), f"{figures['peak_memory'] / 2**30:.2f}"])
    parts = []
    for name, by_depth in found.items():
        for part, counts in by_depth[DEPTHS[-1]]["parts"].items():
            if counts["launches"]:
                parts.append([name, part, *_cells(counts)])
    lines = []
    for name, by_depth in found.items():
        for line, counts in list(by_depth[DEPTHS[-1]]["lines"].items())[:LINES]:
            lines.append([name, str(line), *_cells(counts)[:4]])
    sections = [
        markdown_table(["", "layers", *titles], updates),
        markdown_table(["parts at full depth", "part", *titles[:-1]], parts),
        markdown_table(["lines at full depth", "line", *titles[:4]], lines),
    ]
    if size == "paper":
        sections.append(_recipe(found, batch))
    return "\n\n".join(sections)


def _recipe(found, batch):
    header = ["bound of the whole recipe, 75 epochs of LibriSpeech 960 h", "full depth, GPU-hours", "PROP-1, GPU-hours"]
    rows = []
    updates = RECIPE_UPDATES * RECIPE_BATCH / batch
    for name, by_depth in found.items():
        seconds = {depth: sum(part["seconds"] for part in by_depth[depth]["parts"].values()) for depth in by_depth}
        grown = f"{growing(seconds, 'prop') * updates / 3600:.1f}" if len(seconds) == len(DEPTHS) else ""
        rows.append([name, f"{seconds[DEPTHS[-1]] * updates / 3600:.1f}", grown])
    return markdown_table(header, rows)


def _cells(counts):
    return (
        f"{counts['seconds'] * 1e3:.1f}", f"{counts['flops'] / 1e12:.2f}", f"{counts['bytes'] / 1e9:.1f}",
        f"{counts['launches']:.0f}", f"{counts['waits']:.0f}",
    )  # fmt: skip


def _has_shape_alone(value):
    return torch.is_tensor(value) and (value.is_meta or _is_large(value))


def _is_large(tensor):
    """Whether it is a floating-point tensor with more than one number."""
    return tensor.dtype.is_floating_point and tensor.numel() > 1


def _counted_out(indices):
    """The indices of a tensor, with masks replaced by the positions where they are true, whose number is known."""
    found = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            known = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
            found.extend(known.nonzero(as_tuple=True))
    return found


def _backward_flops(gradient, x, weight, *options):
    """Operations for a convolution's gradients. torch ignores the groups when it counts those of the weight."""
    to_x, to_weight, _ = options[-1]
    return 2 * gradient.numel() * weight[0].numel() * (to_x + to_weight)


def _bytes(tensor):
    """Bytes of a tensor that a kernel reads or writes; expanded dimensions count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride else 1
    return count * tensor.element_size()
