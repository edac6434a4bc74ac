"""The attention kernels of a pretended GPU: what they refuse, and what they compute."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

HALF = (torch.float16, torch.bfloat16)


def chosen_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> SDPBackend:
    """Returns the fused kernel that torch chooses for F.scaled_dot_product_attention.

    Raises:
        RuntimeError: no fused kernel that is switched on takes these types, this size of a head or a mask.
    """
    size, switches = query.size(-1), torch.backends.cuda
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype} has no fused kernel")
    if size % 8 and size > 8:
        raise RuntimeError(f"attention with heads of {size} features has no fused kernel")
    if switches.flash_sdp_enabled() and query.dtype in HALF and mask is None:
        return SDPBackend.FLASH_ATTENTION
    if switches.mem_efficient_sdp_enabled():
        return SDPBackend.EFFICIENT_ATTENTION
    raise RuntimeError("no fused kernel that is switched on takes this attention: flash attention takes no mask")


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: Tensor,
    key_limits: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:
    """Computes aten._flash_attention_forward of a row of sequences, [all frames, heads, features], by products.

    Raises:
        RuntimeError: the kernel would refuse the arguments, or the limits do not fit the row.
    """
    _check(query, key, value, limits, key_limits, longest, longest_key)
    seed = torch.randint(1 << 62, (2,))  # stands for the state of the random numbers
    output = torch.empty_like(query)
    for span, weights, kept in _weights(query, key, limits, dropout, seed):
        output[span] = _to_rows((weights * kept) @ _heads(value[span]), query)
    return output, query.new_empty(0), seed, seed, query.new_empty(0)


def flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    limits: Tensor,
    key_limits: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes aten._flash_attention_backward, see flash_forward."""
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for span, weights, kept in _weights(query, key, limits, dropout, seed):
        upstream, scale = _heads(gradient[span]), query.size(2) ** -0.5
        to_weights = (upstream @ _heads(value[span]).transpose(1, 2)) * kept
        to_scores = scale * weights * (to_weights - (to_weights * weights).sum(2, keepdim=True))
        found = (
            to_scores @ _heads(key[span]),
            to_scores.transpose(1, 2) @ _heads(query[span]),
            (weights * kept).transpose(1, 2) @ upstream,
        )
        for whole, part in zip(gradients, found):
            whole[span] = _to_rows(part, query)
    return gradients


def _check(query, key, value, limits, key_limits, longest, longest_key):
    if not query.dtype == key.dtype == value.dtype or query.dtype not in HALF:
        raise RuntimeError(f"flash attention takes fp16 or bf16, not {query.dtype}, {key.dtype} and {value.dtype}")
    if query.size(2) % 8 or query.size(2) > 256:
        raise RuntimeError(f"flash attention takes heads of a multiple of 8 up to 256 features, not {query.size(2)}")
    for each, most in ((limits, longest), (key_limits, longest_key)):
        if each.dtype != torch.int32 or not each.is_contiguous():
            raise RuntimeError("flash attention takes contiguous limits of the type int32")
        lengths = each.diff()
        if each[0] or each[-1] != len(query) or lengths.min() < 0 or lengths.max() > most:
            raise RuntimeError(f"the limits {each.tolist()} do not fit {len(query)} frames")


def _weights(query, key, limits, dropout, seed) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each sequence its frames, its attention weights in fp32 and the factors of dropout."""
    generator = torch.Generator().manual_seed(int(seed[0]))
    for start, end in zip(limits.tolist(), limits.tolist()[1:]):
        span = slice(start, end)
        scores = _heads(query[span]) @ _heads(key[span]).transpose(1, 2) / math.sqrt(query.size(2))
        kept = torch.rand(scores.shape, generator=generator) >= dropout
        yield span, scores.softmax(2), kept / (1 - dropout)


def _heads(rows):
    return rows.float().transpose(0, 1)


def _to_rows(heads, like):
    return heads.transpose(0, 1).to(like.dtype)
