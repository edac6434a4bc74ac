"""fairseq's Adam, computed by torch's fused kernels."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, adam
from omegaconf import II
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass
class AdamWConfig(FairseqDataclass):
    """Adam with decoupled weight decay; the fields are those of fairseq's adam."""

    adam_betas: Any = field(default="(0.9, 0.999)", metadata={"help": "decay of the first and the second moment"})
    adam_eps: float = field(default=1e-8, metadata={"help": "number that is added to the root of the second moment"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay, multiplied by the learning rate"})
    lr: list[float] = II("optimization.lr")


# fairseq finds by the name of the class which optimizer saved a state. Those of fairseq's `adam` can be loaded.
class FairseqAdam(adam.FairseqAdam):
    """fairseq's `adam` in a few kernels: its mathematics and its state, to rounding."""

    def __init__(self, cfg: Any, params: Sequence[Tensor]) -> None:
        FairseqOptimizer.__init__(self, cfg)
        self._optimizer = FusedAdam(params, **self.optimizer_config)

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        grads = [parameter.grad for parameter in self.params if parameter.grad is not None]
        if not grads:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        norm = torch.stack(torch._foreach_norm(grads, 2, torch.float32)).norm()  # pyright: ignore[reportPrivateImportUsage]
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1))  # pyright: ignore[reportPrivateImportUsage]
        return norm


class FusedAdam(adam.Adam):
    """fairseq's Adam for parameters of any precision, with moments in fp32.

    A flat buffer of many parameters may name the parts of it that have a gradient, as slices in its attribute `used`.
    The other parts are not updated.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_step = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    moments = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
                    state.update(zip(("step", "exp_avg", "exp_avg_sq"), (0, *moments)))
                state["step"] += 1
                whole = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                parts = getattr(parameter, "used", None)
                # Indexing takes the CPU some microseconds, for which the GPU waits.
                pieces = [whole] if parts is None else [[tensor[part] for tensor in whole] for part in parts]
                by_step[state["step"]] += pieces
            for step, found in by_step.items():
                _update(step, group, *map(list, zip(*found)))
        return loss


def _update(
    step: int,
    group: Mapping[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
) -> None:
    """Update parameters and moments in place; `step` counts from 1."""
    wide = [parameter.float() for parameter in parameters]
    beta1, beta2 = group["betas"]
    adamw(
        wide,
        [gradient.float() for gradient in gradients],
        means,
        squares,
        [],
        # The kernel takes a tensor for each parameter, and adds 1.
        list(torch.full((len(wide),), step - 1.0, device=wide[0].device).unbind()),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        # torch adds eps to the root of the corrected second moment, fairseq to that of the second moment itself.
        eps=group["eps"] / math.sqrt(1 - beta2**step),
        maximize=False,
    )
    if wide[0].dtype != parameters[0].dtype:  # otherwise they are the same tensors
        torch._foreach_copy_(parameters, wide)  # pyright: ignore[reportPrivateImportUsage]
