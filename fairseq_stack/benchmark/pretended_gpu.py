"""A pretended GPU: its tensors have the device `cuda:0`, and the CPU computes them.

Code inside `pretended_gpu()` runs its path for GPUs with real numbers on a machine without a GPU. Operations that a GPU
refuses raise an error: operations on tensors of two devices, and fused attention with shapes that no kernel supports.
Launches of kernels and waits of the CPU for the GPU are counted. Real kernels, with their numerics and their speed, and
NCCL are not simulated.

torch's FakeTensorMode is no alternative: its tensors have no numbers, and `backward` asks CUDA's driver for a device.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fairseq_stack.benchmark.pretended_attention import chosen_kernel, flash_backward, flash_forward
from fairseq_stack.errors import InputError

aten = torch.ops.aten
# Operations that have no kernel for a CPU.
KERNELS = {aten._flash_attention_forward: flash_forward, aten._flash_attention_backward: flash_backward}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put)
# These accept tensors on the CPU together with tensors on a GPU.
BOTH_DEVICES = (aten.copy_, aten._to_copy, *INDEXING)
# The CPU waits for a number, or for a size that depends on numbers.
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
WITHOUT_KERNEL = (
    aten.detach, aten._unsafe_view, aten.lift_fresh,
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
)  # fmt: skip
MEMORY = 80 << 30  # bytes, an H100's
# torch 2.4 asks the driver for the device of each tensor.
AVAILABLE = hasattr(torch._C, "_ensureCUDADeviceGuardSet")


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU. Its numbers are in `cpu_tensor`."""

    # torch's documented way to disable it; the stub has another signature than torch.Tensor's method.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    machine: "Machine | None" = None  # of the pretended_gpu() in use
    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> "OnGpu":
        self: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=torch.device("cuda", 0),
        )
        self.cpu_tensor = cpu_tensor
        return self

    def __repr__(self) -> str:
        return f"OnGpu({self.cpu_tensor!r})"

    def tolist(self) -> Any:
        """Returns the numbers as Python's."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        copied: Tensor = OnGpu(self.cpu_tensor.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if cls.machine is None:
            raise RuntimeError(f"{func} on a tensor of the pretended GPU, outside of pretended_gpu()")
        with cls.machine:  # another thread, where the mode is not active
            return func(*args, **(kwargs or {}))


class Machine(TorchDispatchMode):
    """Computes the pretended GPU's operations on the CPU, refuses to mix the two devices, and counts.

    Attributes:
        launches: Counter of places in the code that launch a kernel. A fused kernel is one launch unless torch's
            dispatcher gets its parts.
        waits: Counter of (operation, place) where the CPU waits for the GPU.

    Args:
        package: places are lines of this package. What other code launches counts for the line that called it.
    """

    def __init__(self, package: str = "fairseq_stack"):
        super().__init__()
        self.package = package
        self.here: str | None = None  # the place of the operation that was counted last
        self.node: Any = None  # autograd's, while the backward pass computes
        self.node_places: dict[int, str | None] = {}  # the lines of the forward pass, by the numbers of the nodes
        self.launches: Counter[str | None] = Counter()
        self.waits: Counter[tuple[str, str | None]] = Counter()

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
        if torch.Tag.inplace_view in func.tags:  # such as t_(), which changes the wrapper's shape, too
            with no_dispatch():
                func(*args, **kwargs)
        cpu_args, cpu_kwargs = tree_map(
            lambda each: each.cpu_tensor if isinstance(each, OnGpu) else each, (args, kwargs)
        )
        wrappers = {id(each.cpu_tensor): each for each in tensors if isinstance(each, OnGpu)}
        made = self.compute(func, cpu_args, cpu_kwargs)
        to_cpu = operation is aten._to_copy and device == "cpu" or operation is aten.copy_ and id(made) not in wrappers
        if to_cpu:
            return made
        return tree_map(lambda each: _wrapped(each, wrappers) if isinstance(each, torch.Tensor) else each, made)

    def compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operation on tensors of the CPU."""
        return KERNELS.get(func.overloadpacket, func)(*args, **kwargs)

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
        """Computes F.scaled_dot_product_attention by matrix products. torch would ask the driver for a kernel.

        Raises:
            RuntimeError: see chosen_kernel.
        """
        if isinstance(query, OnGpu):
            chosen_kernel(query, key, value, attn_mask)
        products = aten._scaled_dot_product_attention_math
        return products(query, key, value, added_mask(attn_mask, query), dropout_p, is_causal, scale=scale)[0]

    def check_devices(self, func: Any, tensors: list[Tensor]) -> None:
        """Raises a RuntimeError for tensors of two devices, as CUDA does. One without dimensions may be on the CPU."""
        if func.overloadpacket in BOTH_DEVICES:
            return
        lists = func.overloadpacket in (aten.cat, aten.stack)  # these refuse tensors without dimensions, too
        on_cpu = [each for each in tensors if not isinstance(each, OnGpu) and (each.dim() or lists)]
        if on_cpu and len(on_cpu) < len(tensors):
            found = [(each.device.type, tuple(each.shape)) for each in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")

    def count(self, func: Any, args: tuple, kwargs: dict[str, Any], device: str | None) -> None:
        """Counts a launch, and a wait if the CPU needs a result or copies without `non_blocking`."""
        operation = func.overloadpacket
        waits = operation in WAITING
        if operation in INDEXING:  # the size of the result depends on the numbers in a mask
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
            # torch calls masked_fill to set all of them to one number of the CPU.
            waits = waits and not (len(args) > 2 and not isinstance(args[2], OnGpu) and args[2].numel() == 1)
        elif operation is aten._to_copy and device:
            to_gpu = device == "cuda"
            waits = to_gpu != isinstance(args[0], OnGpu) and not (to_gpu and kwargs.get("non_blocking"))
        elif operation is aten.copy_:
            to_gpu = isinstance(args[0], OnGpu)
            waits = to_gpu != isinstance(args[1], OnGpu) and not (to_gpu and args[2:] == (True,))
        self.here = self.place()
        if waits:
            self.waits[operation._qualified_op_name.split("::")[1], self.here] += 1
        if not func.is_view and operation not in WITHOUT_KERNEL:
            self.launches[self.here] += launches(args)

    def place(self) -> str | None:
        """Returns FOLDER/FILE:LINE of the package that called an operation, else of the nearest code outside torch.

        In the backward pass this is the line of the forward pass.
        """
        if self.node is not None:
            return f"{self.node_places.get(self.node._sequence_nr(), self.node.name())}, backward"
        place = self.caller()
        # The node of an operation is older than the operation's first kernel.
        autograd: Any = torch.autograd
        self.node_places.setdefault(autograd._get_sequence_nr() - 1, place)
        return place

    def caller(self) -> str | None:
        """Returns the line that called an operation."""
        frame, nearest = sys._getframe(3), None
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
def pretended_gpu(machine: Machine | None = None) -> Iterator[Machine]:
    """Pretends inside the `with` block that there is a GPU, and yields its Machine.

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


def launches(args: tuple) -> int:
    """Returns the number of kernels of an operation with these arguments: one, or several for lists of tensors.

    A launch takes up to so many tensors and blocks of numbers as in torch's MultiTensorApply.cuh.
    """
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], torch.Tensor)]
    if not lists:
        return 1
    blocks = sum(math.ceil(tensor.numel() / 65536) for tensor in lists[0])
    return max(1, math.ceil(len(lists[0]) / (110, 64, 48, 36, 30)[len(lists) - 1]), math.ceil(blocks / 320))


def _wrapped(cpu_tensor, wrappers):
    """The wrapper of a result. An operation in place returns its argument, which has a wrapper already."""
    return wrappers[id(cpu_tensor)] if id(cpu_tensor) in wrappers else OnGpu(cpu_tensor)


def _backward(loss, gradient=None, **_):
    """torch.Tensor.backward for a loss without dimensions, with autograd's checks.

    torch's own engine asks CUDA's driver for the streams of the tensors.
    """
    waiting, found = Counter(), [loss.grad_fn]
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    found.append(node)
                waiting[node] += 1
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    ready, machine = [loss.grad_fn], OnGpu.machine
    assert machine is not None
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, *given)
                continue
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            machine.node = node
            made = call(*given)
            for (target, slot), value in zip(node.next_functions, made if isinstance(made, tuple) else (made,)):
                if target is None:
                    continue
                slots = gradients.setdefault(target, [None] * len(target._input_metadata))
                if value is not None:
                    if any(value is each for each in given):  # passed on, perhaps to several nodes
                        value.shared = True
                    value = _checked(node, value, target._input_metadata[slot])
                    slots[slot] = value if slots[slot] is None else slots[slot] + value
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
    machine.node = None


def _accumulate(parameter, gradient):
    """Adds to a parameter's gradient. The first one becomes it, or a copy if it is in use or has other strides."""
    if gradient is None:
        return
    if parameter.grad is not None:
        parameter.grad = parameter.grad + gradient
    elif hasattr(gradient, "shared") or gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad = gradient.detach()


def _checked(node, gradient, expected):
    """The gradient in the expected shape and type. Raises a RuntimeError if it is on another device."""
    if gradient.device != expected.device:
        raise RuntimeError(f"{node.name()} returned a gradient on {gradient.device}, expected {expected.device}")
    return gradient.sum_to_size(expected.shape).to(expected.dtype)


def added_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Returns an attention mask to add to the scores, with -inf where a boolean mask is false."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
