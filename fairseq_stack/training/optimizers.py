"""fairseq's optimizers with their whole state, so that a resumed run equals a run without a stop.

fairseq saves the weights in half precision. It does not save the fp32 masters and the counters of the loss scaler, so
a resumed run would continue from rounded masters.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from fairseq import optim
from torch import Tensor

# Counters of fairseq's DynamicLossScaler. fairseq saves loss_scale itself; the other attributes are configuration.
_COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


# To a type checker, the mixin below is an optimizer.
_Base = optim.FairseqOptimizer if TYPE_CHECKING else object


class _ScalerSaved(_Base):
    """Adds the counters of the DynamicLossScaler to an optimizer's state. bf16 has no scaler."""

    scaler: Any

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.scaler is not None:
            state["scaler"] = {name: getattr(self.scaler, name) for name in _COUNTERS}
        return state

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        super().load_state_dict(state_dict, optimizer_overrides)
        if self.scaler is not None:
            vars(self.scaler).update(state_dict.get("scaler", {}))


# The three classes have the names of fairseq's classes. By the name, fairseq finds which optimizer saved a state.


class FP16Optimizer(_ScalerSaved, optim.FP16Optimizer):
    """fairseq's optimizer for fp16 and bf16, with the fp32 masters in its state."""

    @property
    def masters(self) -> list[Tensor]:
        """Return the fp32 masters: one for each parameter, or one flat buffer for each device."""
        return list(self.fp32_params.values()) if isinstance(self.fp32_params, dict) else self.fp32_params

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": [master.data for master in self.masters]}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        super().load_state_dict(state_dict, optimizer_overrides)
        if "masters" in state_dict:  # fairseq's own checkpoints have none
            for master, saved in zip(self.masters, state_dict["masters"]):
                master.data.copy_(saved)

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """For each parameter, its part of the masters and a buffer for that part's gradient, in its shape."""
        if not self.has_flat_params:
            return [(master.data, torch.empty_like(master.data)) for master in self.masters]
        (flat,) = self.masters  # one for each device, and all parameters of a process are on one
        assert flat.grad is not None  # fairseq has made it
        sizes = [half.numel() for half in self.fp16_params]
        parts = zip(self.fp16_params, flat.data.split(sizes), flat.grad.split(sizes))
        return [(master.view_as(half), gradient.view_as(half)) for half, master, gradient in parts]

    # fairseq copies each parameter by itself.

    def _sync_fp16_grads_to_fp32(self) -> None:
        if not self._needs_sync:
            return
        pairs = [(half.grad, buffer) for half, (_, buffer) in zip(self.fp16_params, self._parts)]
        gradients = [gradient for gradient, _ in pairs if gradient is not None]
        buffers = [buffer for gradient, buffer in pairs if gradient is not None]
        torch._foreach_copy_(buffers, gradients)  # pyright: ignore[reportPrivateImportUsage]  not in the stubs
        if self.has_flat_params:
            self.masters[0].used = self._used()  # pyright: ignore[reportAttributeAccessIssue]  for adamw.FusedAdam
        else:
            # fairseq gives the masters of unused layers a gradient of zeros, and Adam would process it.
            for master, (gradient, buffer) in zip(self.masters, pairs):
                master.grad = None if gradient is None else buffer
        self._needs_sync = False

    def _used(self) -> list[slice]:
        """The parts of the flat masters whose parameters have a gradient."""
        used, end = [], 0
        for half in self.fp16_params:
            start, end = end, end + half.numel()
            if half.grad is not None:
                used.append(slice(used.pop().start if used and used[-1].stop == start else start, end))
        return used

    def _sync_fp32_params_to_fp16(self) -> None:
        halves = [half.data for half in self.fp16_params]
        torch._foreach_copy_(halves, [master for master, _ in self._parts])  # pyright: ignore[reportPrivateImportUsage]

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        norm = super().clip_grad_norm(max_norm, aggregate_norm_fn)
        self._multiply_factor = float(self._multiply_factor)  # a tensor would be copied to the GPU again
        return norm

    def zero_grad(self) -> None:
        if not self.has_flat_params:
            for master in self.fp32_params:
                master.grad = None  # fairseq would fill it with zeros
        super().zero_grad()


class MemoryEfficientFP16Optimizer(_ScalerSaved, optim.MemoryEfficientFP16Optimizer):
    """fairseq's optimizer for fp16 and bf16 without masters."""

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        super().load_state_dict(state_dict, optimizer_overrides)
        # fairseq leaves the moments on the CPU, where it reads a checkpoint, and moves them in every step of its Adam.
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                state[name] = value.to(parameter.device) if torch.is_tensor(value) else value


class AMPOptimizer(optim.AMPOptimizer):
    """fairseq's optimizer for automatic mixed precision, with the state of torch's loss scaler in its state.

    Without a GPU the model computes in fp32.
    """

    def step(self) -> None:
        # fairseq's clip_grad_norm unscales the gradient of this optimizer, but its step passes another object to the
        # scaler. The scaler does not know that one and would divide by the scale a second time.
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        super().load_state_dict(state_dict, optimizer_overrides)
        if state_dict.get("scaler"):
            self.scaler.load_state_dict(state_dict["scaler"])


def save_whole_state(optimizer: Any, cfg: Any) -> None:
    """Let an optimizer that fairseq has built save and restore its whole state. Optimizers for fp32 already do.

    Args:
        optimizer: a FairseqOptimizer, or a FairseqBMUF around one. Its class becomes the class of the same name here.
        cfg: fairseq's configuration. For AMP, the loss scale starts at common.amp_init_scale and grows after
            common.amp_scale_window updates without an overflow. (fairseq would start at fp16's scale, and use the scale
            as the window.)
    """
    if isinstance(optimizer, optim.FairseqBMUF):
        save_whole_state(optimizer._optimizer, cfg)
        optimizer.initial_state = optimizer.state_dict()
    for ours in (FP16Optimizer, MemoryEfficientFP16Optimizer, AMPOptimizer):
        if type(optimizer) in ours.__bases__:
            optimizer.__class__ = ours  # pyright: ignore[reportAttributeAccessIssue]  it is a subclass of the class so far
    if isinstance(optimizer, AMPOptimizer):
        window = cfg.common.amp_scale_window
        optimizer._grad_scaler = torch.amp.GradScaler(  # pyright: ignore[reportAttributeAccessIssue]  CUDA's or any other
            next(iter(optimizer.params)).device.type,
            init_scale=cfg.common.amp_init_scale,
            **({} if window is None else {"growth_interval": window}),
        )
