"""HuBERT's transformer: fairseq's modules with their own forward pass, which runs chosen layers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import TransformerEncoder, TransformerSentenceEncoderLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_stack.models.conv_extractor import autocast_dtype
from fairseq_stack.models.dropout import dropout, kept, masked
from fairseq_stack.models.gpu_attention import flash_spans, gpu_attention
from fairseq_stack.models.pos_conv import positions

# Of a layer: what they return is added to the layer's input.
OUTPUT_PROJECTIONS = ("self_attn.out_proj", "fc2")


class LayerStack(TransformerEncoder):
    """fairseq's transformer with its positional convolution. It runs only chosen layers.

    Frames stay [B, T, D] throughout; fairseq changes to [T, B, D] and back.
    """

    pos_conv: nn.Sequential
    compiled: Any = None  # EncoderLayer.forward, after compile_layers

    def build_encoder_layer(self, args: Any, **kwargs: Any) -> "EncoderLayer":
        """Build one layer; fairseq's constructor calls this."""
        return EncoderLayer(
            embedding_dim=args.encoder_embed_dim,
            ffn_embedding_dim=args.encoder_ffn_embed_dim,
            num_attention_heads=args.encoder_attention_heads,
            dropout=args.dropout,
            attention_dropout=args.attention_dropout,
            activation_dropout=args.activation_dropout,
            activation_fn=args.activation_fn,
            layer_norm_first=args.layer_norm_first,
        )

    def compile_layers(self, backend: Any = "inductor") -> None:
        """Compile the layers with torch.compile.

        One graph serves all layers, because their weights are its inputs, and batches of all lengths. So a growth
        compiles nothing.
        """
        torch._dynamo.config.inline_inbuilt_nn_modules = True  # the default since torch 2.5
        self.compiled = torch.compile(EncoderLayer.forward, dynamic=True, backend=backend)

    def forward(self, x: Tensor, frames: Tensor, seats: Sequence[int], upto: int | None = None) -> list[Tensor]:
        """Compute the hidden states of the layers in `seats`.

        Args:
            x: [B, T, D], the transformer's input.
            frames: [B], the number of frames of each utterance.
            seats: indices of the layers to run, in order.
            upto: run only the first `upto` of them (default: all).

        Returns:
            a list of 1 + min(upto, len(seats)) tensors [B, T, D].
        """
        padding = torch.arange(x.size(1)) >= frames.cpu()[:, None]  # on a GPU, `any` would make the CPU wait
        padding = padding.to(x.device, non_blocking=True) if bool(padding.any()) else None
        x = x + positions(self.pos_conv, x, padding)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = dropout(x, self.dropout, self.training)

        if x.is_cuda:
            first: Any = self.layers[0]
            spans = flash_spans(x, autocast_dtype(x, x.dtype), first.self_attn.head_dim, frames)
            padding = padding if spans is None else spans
        hidden_states = [x]
        for position, seat in enumerate(seats[:upto], start=1):
            layer = self.layers[seat]
            x = self.compiled(layer, x, padding) if self.compiled else layer(x, padding)
            last = self.layer_norm_first and position == len(seats)
            hidden_states.append(self.layer_norm(x) if last else x)
        return hidden_states

    def __getstate__(self) -> dict[str, Any]:
        # fairseq's moving average copies the model. torch's weight norm keeps the weight that it computed last, a node
        # of autograd's graph, which cannot be copied. It is detached here; the next forward pass computes it again.
        for module in self.pos_conv.modules():
            if isinstance(module, nn.Conv1d) and hasattr(module, "weight_g"):
                module.weight = module.weight.detach()
        return self.__dict__


class EncoderLayer(TransformerSentenceEncoderLayer):
    """fairseq's layer: self-attention and feed-forward, each with a residual connection and a norm before or after."""

    def __init__(self, *args: Any, activation_fn: str, **kwargs: Any) -> None:
        super().__init__(*args, activation_fn=activation_fn, **kwargs)
        if activation_fn == "gelu":
            self.activation_fn = F.gelu  # the same result as fairseq's, which converts to fp32 and back

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Run the layer: [B, T, D] to [B, T, D]. `padding` is that of `attention`."""
        if self.layer_norm_first:
            x = x + self.drop(self.attend(self.self_attn_layer_norm(x), padding), self.dropout1)
            return x + self.drop(self.feed_forward(self.final_layer_norm(x)), self.dropout3)
        x = self.self_attn_layer_norm(x + self.drop(self.attend(x, padding), self.dropout1))
        return self.final_layer_norm(x + self.drop(self.feed_forward(x), self.dropout3))

    def drop(self, x: Tensor, module: nn.Dropout) -> Tensor:
        """Apply dropout to x with the probability of fairseq's module."""
        return dropout(x, module.p, self.training)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Run the feed-forward layers on x [B, T, D]."""
        return self.fc2(self.drop(self.activation_fn(self.fc1(x)), self.dropout2))

    def attend(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Run the self-attention on x [B, T, D]."""
        module = self.self_attn
        projections = module.q_proj, module.k_proj, module.v_proj
        weight, bias = (torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias"))
        heads = F.linear(x, weight, bias).unflatten(2, (3, module.num_heads, module.head_dim))
        probability = module.dropout_module.p if self.training else 0.0
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        x = attention(query, key, value, padding, probability)
        return module.out_proj(x.transpose(1, 2).flatten(2))


def attention(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout_probability: float) -> Tensor:
    """Scaled dot-product attention of [B, heads, T, features of a head].

    `padding` [B, T] is true after the end of an utterance; on a GPU it may also be the result of flash_spans. On a CPU
    plain matrix products are faster: torch's backward pass takes twice as long in bf16, and torch has no fast kernel
    with dropout.
    """
    if query.is_cuda:
        return gpu_attention(query, key, value, padding, dropout_probability)
    keep, scale = None, 1.0
    if dropout_probability:
        keep, scale = kept((*query.shape[:3], key.size(2)), dropout_probability)
    lengths = [key.size(2)] * len(key) if padding is None else (~padding).sum(1).tolist()
    return Attention.apply(query, key, value, lengths, keep, scale)


class Attention(torch.autograd.Function):
    """(softmax(query @ key.T / sqrt(features)) * keep * scale) @ value, each utterance over its own frames.

    It computes one utterance after another, so that the scores stay in the processor's cache. For the backward pass it
    keeps one tensor of the scores' size and the mask. Separate torch functions keep three such tensors in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], keep: Tensor | None, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        ctx.factor, ctx.scale = query.size(3) ** -0.5, scale
        scratch = None if keep is None else query.new_empty(keep[0].numel())
        all_weights = []
        for row, length in enumerate(lengths):
            weights = query.new_empty(*query.shape[1:3], length)
            _product(query[row], key[row, :, :length].transpose(1, 2), ctx.factor, out=weights)
            torch.softmax(weights, 2, out=weights)
            dropped = _dropped(weights, keep, row, scratch)
            _product(dropped, value[row, :, :length], scale, out=output[row])
            all_weights.append(weights)
        ctx.save_for_backward(query, key, value, keep, *all_weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep, *all_weights = ctx.saved_tensors
        query_gradient, key_gradient, value_gradient = (torch.zeros_like(x) for x in (query, key, value))
        scratch = query.new_empty(max(weights.numel() for weights in all_weights))
        for row, weights in enumerate(all_weights):
            length, upstream = weights.size(2), gradient[row].contiguous()
            dropped = _dropped(weights, keep, row, scratch)
            _product(dropped.transpose(1, 2), upstream, ctx.scale, out=value_gradient[row, :, :length])
            scores = scratch[: weights.numel()].view_as(weights)
            _product(upstream, value[row, :, :length].transpose(1, 2), ctx.scale, out=scores)
            scores = _dropped(scores, keep, row, scratch)
            torch.ops.aten._softmax_backward_data.out(scores, weights, 2, weights.dtype, grad_input=scores)
            _product(scores, key[row, :, :length], ctx.factor, out=query_gradient[row])
            _product(scores.transpose(1, 2), query[row], ctx.factor, out=key_gradient[row, :, :length])
        return query_gradient, key_gradient, value_gradient, None, None, None


def _dropped(x: Tensor, keep: Tensor | None, row: int, scratch: Tensor | None) -> Tensor:
    """Return x [heads, T, length] * keep[row] in the memory of `scratch`, or x itself if there is no mask."""
    if keep is None or scratch is None:
        return x
    return masked(x, keep[row, :, :, : x.size(2)], scratch[: x.numel()].view_as(x))


def _product(x: Tensor, y: Tensor, factor: float, out: Tensor) -> None:
    """Write factor * x @ y to `out`."""
    torch.baddbmm(out, x, y, beta=0, alpha=factor, out=out)
