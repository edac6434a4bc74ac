"""Attention on a GPU.

With a padding mask, torch's scaled_dot_product_attention cannot use flash attention. Flash attention can take many
sequences of any lengths, one after another. A padded batch is such a row: the frames of an utterance, its padding, the
frames of the next utterance, and so on. So the padding is an utterance of its own, and no mask is needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# In the order in which torch tries them. cuDNN's is left out, because it makes a new plan for each length of a batch.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def flash_spans(x: Tensor, dtype: torch.dtype, head_size: int, frames: Tensor) -> Tensor | None:
    """The limits between frames and padding, if flash attention can compute the attention of x [B, T, D].

    Args:
        x: on a GPU.
        dtype: in which the attention is computed.
        head_size: features of a head.
        frames: [B], the number of frames of each utterance, on the CPU: otherwise the CPU waits for the GPU.

    Returns:
        [2 B + 1] int32, positions in a row of B * T frames: 0, and for each utterance the end of its frames and the
        end of its padding. None if this GPU, the type or the size of a head does not allow flash attention.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if not half or head_size % 8 or head_size > 256 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return None
    ends = torch.arange(1, len(x) + 1) * x.size(1)
    limits = torch.stack([ends - x.size(1) + frames.cpu(), ends], dim=1)
    return F.pad(limits.flatten(), (1, 0)).int().to(x.device, non_blocking=True)


def gpu_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout_probability: float
) -> Tensor:
    """Scaled dot-product attention of [B, heads, T, features of a head] on a GPU.

    Args:
        query, key, value: [B, heads, T, features of a head].
        padding: [B, T] bool, true after the end of an utterance; the result of flash_spans; or None.
        dropout_probability: of the attention weights.

    Returns:
        [B, heads, T, features of a head]. What it holds after the end of an utterance has no meaning.
    """
    if padding is None or padding.dtype == torch.bool:
        mask = None if padding is None else ~padding[:, None, None]
        with sdpa_kernel(KERNELS):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_probability)
    frames = query.size(2)
    rows = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    # torch.nn.attention.varlen has no dropout; this is the operation behind it.
    attended = torch.ops.aten._flash_attention_forward(
        *rows, padding, padding, frames, frames, dropout_probability, False, False
    )[0]
    return attended.unflatten(0, (-1, frames)).transpose(1, 2)
