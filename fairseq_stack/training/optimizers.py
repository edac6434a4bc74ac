"""fairseq's optimizers with their whole state, so that a resumed run equals a run without a stop.

fairseq saves the weights in half precision. It does not save the fp32 masters and the counters of the loss scaler, so
a resumed run would continue from rounded masters.
"""

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

    def _sync_fp16_grads_to_fp32(self) -> None:
        if self.has_flat_params:
            super()._sync_fp16_grads_to_fp32()
        elif self._needs_sync:
            # fairseq gives the masters of unused layers a gradient of zeros, and Adam would process it.
            for half, master in zip(self.fp16_params, self.fp32_params):
                master.grad = None if half.grad is None else half.grad.float()
            self._needs_sync = False

    def zero_grad(self) -> None:
        if not self.has_flat_params:
            for master in self.fp32_params:
                master.grad = None  # fairseq would fill it with zeros
        super().zero_grad()


class MemoryEfficientFP16Optimizer(_ScalerSaved, optim.MemoryEfficientFP16Optimizer):
    """fairseq's optimizer for fp16 and bf16 without masters."""


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
