"""The state of a run that fairseq's checkpoints leave out, so that a resumed run is the same run.

This module is where the package reaches into fairseq. `save_whole_state` puts what follows in the place
where fairseq's trainer looks it up:

- optimisers that save their fp32 masters and the counters of their loss scaler. fairseq saves the
  half-precision weights alone, and a resumed run would go on from rounded masters. Idle layers cost them nothing;
- a moving average that grows with the student in fp32 too, and steps at the same updates after a resume;
- loading a checkpoint in every process of a job, and what fairseq loses at the end of an epoch.
"""

import functools
from contextlib import nullcontext

import torch
from fairseq import optim, trainer
from fairseq.logging import metrics
from fairseq.models.ema import EMA

from fairseq_stack.checkpoint import SEATS
from fairseq_stack.errors import input_errors, one_line_errors
from fairseq_stack.growth.surgery import copy_weights

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

    The loss scale is common.amp_init_scale, which grows after common.amp_scale_window updates without an overflow
    (fairseq takes fp16's scale, and the scale as the window). Without a GPU the model computes in fp32.
    """

    def __init__(self, cfg, params, fp32_optimizer, **kwargs):
        super().__init__(cfg, params, fp32_optimizer, **kwargs)
        window = cfg.common.amp_scale_window
        self._grad_scaler = torch.amp.GradScaler(
            params[0].device.type,
            init_scale=cfg.common.amp_init_scale,
            **({} if window is None else {"growth_interval": window}),
        )

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


class MovingAverage(EMA):
    """fairseq's moving average of a student that grows.

    The task finds it as `moving_average` of the averaged student, which is all that fairseq hands over.
    """

    @one_line_errors
    def __init__(self, model, config, device=None):
        seed = config.ema_seed_model
        problem = f"ema.ema_seed_model={seed} has no moving average of a student that fits this configuration"
        # Neither the layers in use nor the state of the plateau schedule have an average: they follow the student.
        with input_errors(problem) if seed else nullcontext():
            super().__init__(model, config, device, skip_keys={"stage", SEATS, "plateau"})
        self.model.moving_average = self
        if self.fp32_params:  # a shared head has several names in the state dict, and one average
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                self.fp32_params[name] = self.fp32_params[names[parameter]]

    def build_fp32_params(self, state_dict=None):
        """Copy the averages in fp32 from a state dict (default: the averaged model's)."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        # Of what is in use, and of the plateau, fairseq would keep the copy of the beginning.
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        super().build_fp32_params({name: state_dict[name] for name in names if name in state_dict})

    def step(self, new_model, updates=None):
        # fairseq counts the updates since the last step and does not save the count.
        self.update_freq_counter = (updates - 1) % self.config.ema_update_freq
        super().step(new_model, updates)

    @torch.no_grad()
    def _step_internal(self, new_model, updates=None):
        # fairseq loads a state dict at each step. Loading reads the stage, for which the CPU has to wait for the GPU.
        averages = self.fp32_params or dict(self.model.named_parameters())
        parameters = dict(new_model.named_parameters())
        averaged = [averages[name] for name in parameters]
        torch._foreach_mul_(averaged, self.decay)
        new = [parameter.to(average.dtype) for parameter, average in zip(parameters.values(), averaged)]
        torch._foreach_add_(averaged, new, alpha=1 - self.decay)
        for name, parameter in self.model.named_parameters() if self.fp32_params else ():
            parameter.copy_(self.fp32_params[name])

    def grow_to(self, stage):
        """Wake the averaged student's layers until `stage` (from 1), in the fp32 copy of ema.ema_fp32 too."""
        self.model.grow_to(stage)
        pairs = self.model.finish_growth()
        if self.fp32_params:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            copy_weights([tuple(self.fp32_params[names[parameter]] for parameter in pair) for pair in pairs])


def _whole(load_checkpoint):
    """fairseq's Trainer.load_checkpoint, which also restores a run that stopped at the end of an epoch.

    There, fairseq saves before the learning rate schedule hears of the validation loss, and a run that goes on
    forgets the means since the last log entry along with those of the epoch.
    """

    @functools.wraps(load_checkpoint)
    def wrapped(self, *args, reset_meters=False, **kwargs):
        # Otherwise rank 0 sends what it has loaded as a pickle that torch's safe loading refuses on the others.
        self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        state = load_checkpoint(self, *args, reset_meters=reset_meters, **kwargs)
        if state is not None and not reset_meters and state["train_iterator"]["iterations_in_epoch"] == 0:
            self.lr_step(state["train_iterator"]["epoch"] - 1, state["val_loss"])
            metrics.load_state_dict({"train_inner": state["metrics"]["train_inner"]})
        return state

    wrapped.whole_state = True
    return wrapped


def save_whole_state():
    """Let every training of this process save and restore its whole state."""
    optim.FP16Optimizer = FP16Optimizer
    optim.MemoryEfficientFP16Optimizer = MemoryEfficientFP16Optimizer
    optim.AMPOptimizer = AMPOptimizer
    trainer.build_ema = MovingAverage
    load_checkpoint = trainer.Trainer.load_checkpoint
    if not hasattr(load_checkpoint, "whole_state"):
        trainer.Trainer.load_checkpoint = _whole(load_checkpoint)
