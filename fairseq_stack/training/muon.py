"""Muon for the matrices of the hidden layers, AdamW for all other parameters, as one optimizer of fairseq.

Muon's momentum of a matrix is orthogonalised before it becomes the update, so that all directions in the matrix learn
at about the same rate (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
https://kellerjordan.github.io/posts/muon). The update is scaled to the root mean square of AdamW's, so that both share
AdamW's learning rate and weight decay (Liu et al., Muon is scalable for LLM training, 2025, arXiv 2502.16982).
torch.optim.Muon does the same one matrix at a time; here, matrices of equal shape are one batch.
"""
# pyright: reportPrivateImportUsage=false
# torch has its functions for lists of tensors under private names only.

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from torch import Tensor

from fairseq_stack.training.adamw import AdamWConfig, FairseqAdam, FusedAdam

# fairseq copies the attribute `param_group` of a parameter to its fp32 master.
MATRIX = "matrix"
# Of the iteration x <- a x + b (x x') x + c (x x')^2 x. Five steps bring each singular value near 1 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


@dataclass
class MuonConfig(AdamWConfig):
    """Muon's momentum, beside the fields of `adamw` for the other parameters."""

    momentum: float = field(default=0.95, metadata={"help": "momentum of the matrices that Muon updates"})


class FairseqMuon(FairseqAdam):
    """Trains parameters marked by `mark_matrices` with Muon, and all others with AdamW."""

    # A flat buffer of all parameters has no matrices.
    supports_flat_params = False  # pyright: ignore[reportAssignmentType]  a property in fairseq

    def __init__(self, cfg: MuonConfig, params: Iterable[Tensor]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # FairseqAdam's would build AdamW for all
        self._optimizer = Muon(params, cfg.momentum, **self.optimizer_config)


class Muon(FusedAdam):
    """FusedAdam, except for the parameters that `mark_matrices` has marked.

    Args:
        params: all parameters. One of more than two dimensions is a matrix of its first dimension and the others.
        momentum: of Muon, between 0 and 1.
        options: of FusedAdam.
    """

    def __init__(self, params: Iterable[Tensor], momentum: float, **options: Any) -> None:
        matrices, others = [], []
        for parameter in params:
            (matrices if getattr(parameter, "param_group", None) == MATRIX else others).append(parameter)
        super().__init__([{"params": others}, {"params": matrices, "momentum": momentum}], **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update all parameters that have a gradient."""
        others, matrices = groups = self.param_groups
        self.param_groups = [others]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._update_matrices(matrices)
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        shapes = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes[parameter.shape].append(parameter)
        rate, momentum = group["lr"], group["momentum"]
        for shape, parameters in shapes.items():
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            update = torch.stack(torch._foreach_lerp(gradients, averages, momentum))  # Nesterov's momentum
            update = orthogonalized(update.flatten(2)).to(parameters[0].dtype)
            scale = 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.view(-1, *shape)), alpha=-rate * scale)


def orthogonalized(x: Tensor) -> Tensor:
    """Return the matrices [N, A, B] with their singular values moved to about 1, by Newton and Schulz's iteration.

    On a GPU it is computed in bf16, as torch.optim.Muon does; errors of the directions average out over updates.
    """
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def mark_matrices(matrices: Iterable[Tensor]) -> None:
    """Let Muon update these parameters of a model, or their fp32 masters."""
    for matrix in matrices:
        matrix.param_group = MATRIX  # pyright: ignore[reportAttributeAccessIssue]  fairseq's own attribute
