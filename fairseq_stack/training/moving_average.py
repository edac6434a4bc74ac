"""The moving average of the weights, which grows with the student."""

from contextlib import nullcontext
from typing import Any

import torch
from fairseq.models.ema import EMA
from torch import Tensor

from fairseq_stack.errors import input_errors
from fairseq_stack.growth.plan import SEATS
from fairseq_stack.growth.surgery import ParameterPair, copy_weights
from fairseq_stack.models.stacked_hubert import StackedHubert


class MovingAverage(EMA):
    """fairseq's moving average, for a student that grows.

    fairseq passes only the averaged student to the task, which finds this object as its `moving_average`.
    """

    def __init__(self, model: StackedHubert, config: Any, device: torch.device | None = None) -> None:
        seed = config.ema_seed_model
        problem = f"ema.ema_seed_model={seed} has no moving average of a student that fits this configuration"
        # The layers in use and the state of the plateau schedule have no average: they follow the student.
        with input_errors(problem) if seed else nullcontext():
            super().__init__(model, config, device, skip_keys={"stage", SEATS, "plateau"})
        self.model.moving_average = self
        if self.fp32_params:  # a shared head has several names in the state dict, but one average
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                self.fp32_params[name] = self.fp32_params[names[parameter]]

    def build_fp32_params(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """Copy the averages in fp32 from a state dict (default: the averaged model's)."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        # fairseq would also copy the layers in use and the plateau, and keep their first values.
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        super().build_fp32_params({name: state_dict[name] for name in names if name in state_dict})

    def step(self, new_model: StackedHubert, updates: int | None = None) -> None:
        assert updates is not None  # fairseq's trainer passes it
        # fairseq counts the updates since the last step, but does not save the count.
        self.update_freq_counter = (updates - 1) % self.config.ema_update_freq
        super().step(new_model, updates)

    @torch.no_grad()
    def _step_internal(self, new_model: StackedHubert, updates: int | None = None) -> None:
        # fairseq loads a state dict at each step. Loading reads the stage, so the CPU would wait for the GPU.
        averages = self.fp32_params or dict(self.model.named_parameters())
        parameters = dict(new_model.named_parameters())
        averaged = [averages[name] for name in parameters]
        torch._foreach_mul_(averaged, self.decay)  # pyright: ignore[reportPrivateImportUsage]  not in the stubs
        new = [parameter.to(average.dtype) for parameter, average in zip(parameters.values(), averaged)]
        torch._foreach_add_(averaged, new, alpha=1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]  the same
        for name, parameter in self.model.named_parameters() if self.fp32_params else ():
            parameter.copy_(self.fp32_params[name])

    def grow_to(self, stage: int) -> None:
        """Activate the averaged student's layers up to `stage` (from 1), also in the fp32 copy of ema.ema_fp32."""
        self.model.grow_to(stage)
        pairs = self.model.finish_growth()
        if self.fp32_params:
            averages = {parameter: self.fp32_params[name] for name, parameter in self.model.named_parameters()}
            copy_weights(ParameterPair(averages[source], averages[new], silent) for source, new, silent in pairs)
