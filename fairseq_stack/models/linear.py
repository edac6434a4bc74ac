"""Linear maps that are as fast on one maker's CPU as on another's."""

import torch
import torch.nn as nn
import torch.nn.functional as F

# oneDNN's, which torch's compiler calls too. torch itself takes Intel's MKL for fp32, which computes such products at
# half the speed on AMD's processors. In bf16 torch takes oneDNN on its own.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x, weight, bias=None):
    """F.linear: [..., D] by [D', D] and [D'] to [..., D']."""
    fp32 = x.dtype == weight.dtype == torch.float32
    if _onednn is None or not fp32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """torch's Linear, through `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows, inputs = gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1))
        to_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        to_weight = _product(rows.t(), inputs.t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, rows.sum(0) if ctx.has_bias else None


def _product(x, weight, bias=None):
    return _onednn(x, weight, bias, "none", [], "")
