"""A GPU that is pretended: its tensors say `cuda:0`, and the CPU computes them.

Code that runs inside `pretended_gpu()` takes its path for GPUs with real numbers on a machine that has none. What a GPU
refuses is refused: an operation on tensors of two devices, and a fused attention kernel on a shape that has none. What
a GPU needs time for is counted: launches of kernels, and waits of the CPU for the GPU. Real kernels, their numerics and
their speed, and NCCL are out of its sight.

torch's FakeTensorMode is no alternative: its tensors have no numbers, and `backward` asks CUDA's driver for a device.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fairseq_stack.errors import InputError

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put)
# These take tensors from the CPU beside those on a GPU.
BOTH_DEVICES = (aten.copy_, aten._to_copy, *INDEXING)
# The CPU learns a number, or a size that depends on numbers.
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
WITHOUT_KERNEL = (
    aten.detach, aten._unsafe_view, aten.lift_fresh,
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
)  # fmt: skip
MEMORY = 80 << 30  # bytes, an H100's
# torch 2.4 asks the driver for the device of each tensor.
AVAILABLE = hasattr(torch._C, "_ensureCUDADeviceGuardSet")


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU. Its numbers are in `inner`, a tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    machine = None  # of the pretended_gpu() that is open

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", 0),
        )
        self.inner = inner
        return self

    def __repr__(self):
        return f"OnGpu({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        copied = OnGpu(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if cls.machine is None:
            raise RuntimeError(f"{func} on a tensor of the pretended GPU, outside of pretended_gpu()")
        with cls.machine:  # in another thread, where it is not in force
            return func(*args, **(kwargs or {}))


class Machine(TorchDispatchMode):
    """Computes what is on the pretended GPU on the CPU, keeps the two devices apart and counts.

    Attributes:
        launches: Counter of places in the code that launch a kernel. A fused kernel counts as what it consists of only
            where torch's dispatcher sees its parts.
        waits: Counter of (operation, place) where the CPU waits for the GPU.

    Args:
        package: the package whose places are counted. What it calls elsewhere counts for the line that calls.
    """

    def __init__(self, package="fairseq_stack"):
        super().__init__()
        self.package = package
        self.launches, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        operation = func.overloadpacket
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device).type
        if device != "cuda" and not any(isinstance(each, OnGpu) for each in tensors):
            return func(*args, **kwargs)
        self.check_devices(func, tensors)
        self.count(func, args, kwargs, device)
        if device:
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        if torch.Tag.inplace_view in func.tags:  # such as t_(): the wrapper has a shape of its own
            with no_dispatch():
                func(*args, **kwargs)
        inner_args, inner_kwargs = tree_map(
            lambda each: each.inner if isinstance(each, OnGpu) else each, (args, kwargs)
        )
        wrappers = {id(each.inner): each for each in tensors if isinstance(each, OnGpu)}
        made = self.compute(func, inner_args, inner_kwargs)
        to_cpu = operation is aten._to_copy and device == "cpu" or operation is aten.copy_ and id(made) not in wrappers
        if to_cpu:
            return made
        return tree_map(lambda each: _wrapped(each, wrappers) if isinstance(each, torch.Tensor) else each, made)

    def compute(self, func, args, kwargs):
        """What an operation makes of tensors on the CPU."""
        return func(*args, **kwargs)

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """F.scaled_dot_product_attention in plain products, since its choice of a kernel asks the driver.

        Raises:
            RuntimeError: no fused kernel takes these types or this size of a head.
        """
        if isinstance(query, OnGpu):
            size = query.size(-1)
            if not query.dtype == key.dtype == value.dtype:
                raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype} has no fused kernel")
            if size % 8 and size > 8:
                raise RuntimeError(f"attention with heads of {size} features has no fused kernel")
        products = aten._scaled_dot_product_attention_math
        return products(query, key, value, added_mask(attn_mask, query), dropout_p, is_causal, scale=scale)[0]

    def check_devices(self, func, tensors):
        """Raise a RuntimeError as CUDA does; a number in a tensor of no dimension may come from the CPU."""
        if func.overloadpacket in BOTH_DEVICES:
            return
        lists = func.overloadpacket in (aten.cat, aten.stack)  # which take no numbers either
        on_cpu = [each for each in tensors if not isinstance(each, OnGpu) and (each.dim() or lists)]
        if on_cpu and len(on_cpu) < len(tensors):
            found = [(each.device.type, tuple(each.shape)) for each in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")

    def count(self, func, args, kwargs, device):
        """Count a launch, and a wait where the CPU needs a result or copies without `non_blocking`."""
        operation = func.overloadpacket
        waits = operation in WAITING
        if operation in INDEXING:  # a mask says by its numbers how many are meant
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif operation is aten._to_copy and device:
            to_gpu = device == "cuda"
            waits = to_gpu != isinstance(args[0], OnGpu) and not (to_gpu and kwargs.get("non_blocking"))
        elif operation is aten.copy_:
            to_gpu = isinstance(args[0], OnGpu)
            waits = to_gpu != isinstance(args[1], OnGpu) and not (to_gpu and args[2:] == (True,))
        if waits:
            self.waits[operation._qualified_op_name.split("::")[1], self.place()] += 1
        if not func.is_view and operation not in WITHOUT_KERNEL:
            self.launches[self.place()] += 1

    def place(self):
        """FOLDER/FILE:LINE in the package that an operation comes from, else the nearest outside of torch."""
        frame, nearest = sys._getframe(2), None
        while frame is not None:
            name = frame.f_code.co_filename
            if name != __file__ and "/torch/" not in name and not name.startswith("<"):
                here = f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
                if f"/{self.package}/" in name:
                    return here
                nearest = nearest or here
            frame = frame.f_back
        return nearest


@contextlib.contextmanager
def pretended_gpu(machine=None):
    """Let everything inside the `with` block find a GPU; gives the Machine.

    Args:
        machine: a Machine (default: a new one).

    Raises:
        InputError: torch is too old.
    """
    if not AVAILABLE:
        raise InputError(
            f"torch {torch.__version__} asks CUDA's driver about every GPU; a pretended one needs a newer torch"
        )
    properties = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132)
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "manual_seed": None,
        "empty_cache": None,
        "synchronize": None,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "_lazy_init": None,
    }
    machine = machine or Machine()
    torch._C._ensureCUDADeviceGuardSet()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lift_cpu_alone = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", _backward))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(mock.patch.object(OnGpu, "machine", machine))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", machine.attention))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield stack.enter_context(machine)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
            torch._C._set_only_lift_cpu_tensors(lift_cpu_alone)


def _wrapped(inner, wrappers):
    """The wrapper of a tensor that the machine has computed: an operation in place returns what it was given."""
    return wrappers[id(inner)] if id(inner) in wrappers else OnGpu(inner)


def _backward(loss, gradient=None, **_):
    """torch.Tensor.backward for a loss without dimensions: autograd's graph in order, with its checks.

    torch's own engine asks CUDA's driver for the streams of the tensors.
    """
    waiting, found = Counter(), [loss.grad_fn]
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    found.append(node)
                waiting[node] += 1
    gradients, ready = {loss.grad_fn: [torch.ones_like(loss)]}, [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, *given)
                continue
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            made = call(*given)
            for (target, slot), value in zip(node.next_functions, made if isinstance(made, tuple) else (made,)):
                if target is None:
                    continue
                slots = gradients.setdefault(target, [None] * len(target._input_metadata))
                if value is not None:
                    value = _checked(node, value, target._input_metadata[slot])
                    slots[slot] = value if slots[slot] is None else slots[slot] + value
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)


def _accumulate(parameter, gradient):
    if gradient is not None:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def _checked(node, gradient, expected):
    """The gradient in the shape and type of what it is for; raises a RuntimeError where the device is another."""
    if gradient.device != expected.device:
        raise RuntimeError(f"{node.name()} returned a gradient on {gradient.device}, expected {expected.device}")
    return gradient.sum_to_size(expected.shape).to(expected.dtype)


def added_mask(mask, query):
    """A mask of attention as what is added to the scores: what is false in a mask of bools becomes -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
