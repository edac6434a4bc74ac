"""fairseq's optimizers with their whole state, so that a resumed run is the same run.

fairseq saves the half-precision weights and leaves out the fp32 masters and the counters of the loss scaler. A resumed run
would go on from rounded masters.
"""

import torch
from fairseq import optim

# Of fairseq's DynamicLossScaler; it saves loss_scale itself, and the rest is configuration.
_COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


class _ScalerSaved:
    """An optimiser whose state holds the counters of its DynamicLossScaler (bf16 has none)."""

    def state_dict(self):
        state = super().state_dict()
        if self.scaler is not None:
            state["scaler"] = {name: getattr(self.scaler, name) for name in _COUNTERS}
        return state

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        super().load_state_dict(state_dict, optimizer_overrides)
        if self.scaler is not None:
            vars(self.scaler).update(state_dict.get("scaler", {}))


# The three classes keep the names of fairseq's, by which it recognises whose state a checkpoint holds.


class FP16Optimizer(_ScalerSaved, optim.FP16Optimizer):
    """fairseq's optimiser for fp16 and bf16, with its fp32 masters in its state."""

    @property
    def masters(self):
        """The fp32 masters, one for each parameter, or one flat buffer for each device."""
        return list(self.fp32_params.values()) if isinstance(self.fp32_params, dict) else self.fp32_params

    def state_dict(self):
        return {**super().state_dict(), "masters": [master.data for master in self.masters]}

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        super().load_state_dict(state_dict, optimizer_overrides)
        if "masters" in state_dict:  # not in a checkpoint from elsewhere
            for master, saved in zip(self.masters, state_dict["masters"]):
                master.data.copy_(saved)

    def _sync_fp16_grads_to_fp32(self):
        if self.has_flat_params:
            super()._sync_fp16_grads_to_fp32()
        elif self._needs_sync:
            # fairseq gives the masters of idle layers a gradient of zeros, which Adam works through as any other.
            for half, master in zip(self.fp16_params, self.fp32_params):
                master.grad = None if half.grad is None else half.grad.float()
            self._needs_sync = False

    def zero_grad(self):
        if not self.has_flat_params:
            for master in self.fp32_params:
                master.grad = None  # fairseq would fill it with zeros
        super().zero_grad()


class MemoryEfficientFP16Optimizer(_ScalerSaved, optim.MemoryEfficientFP16Optimizer):
    """fairseq's optimiser for fp16 and bf16 without masters."""


class AMPOptimizer(optim.AMPOptimizer):
    """fairseq's optimiser for automatic mixed precision, with the state of torch's loss scaler in its state.

    Without a GPU the model computes in fp32.
    """

    def step(self):
        # fairseq's clip_grad_norm unscales the gradient under this optimizer, and its step under another: the scaler
        # does not know that one and divides by the scale a second time.
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self):
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        super().load_state_dict(state_dict, optimizer_overrides)
        if state_dict.get("scaler"):
            self.scaler.load_state_dict(state_dict["scaler"])


def save_whole_state(optimizer, cfg):
    """Let an optimizer that fairseq has built save and restore its whole state. Optimizers of fp32 do already.

    Args:
        optimizer: a FairseqOptimizer, which may be a FairseqBMUF around another; its class becomes that of the same name here.
        cfg: fairseq's configuration. For AMP, the loss scale starts at common.amp_init_scale and grows after
            common.amp_scale_window updates without an overflow. (fairseq takes fp16's scale, and the scale as the window.)
    """
    if isinstance(optimizer, optim.FairseqBMUF):
        save_whole_state(optimizer._optimizer, cfg)
        optimizer.initial_state = optimizer.state_dict()
    for ours in (FP16Optimizer, MemoryEfficientFP16Optimizer, AMPOptimizer):
        if type(optimizer) in ours.__bases__:
            optimizer.__class__ = ours
    if isinstance(optimizer, AMPOptimizer):
        window = cfg.common.amp_scale_window
        optimizer._grad_scaler = torch.amp.GradScaler(
            next(iter(optimizer.params)).device.type,
            init_scale=cfg.common.amp_init_scale,
            **({} if window is None else {"growth_interval": window}),
        )
