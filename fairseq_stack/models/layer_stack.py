"""HuBERT's transformer: fairseq's modules, with a forward pass of its own over chosen layers."""

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import TransformerEncoder, TransformerSentenceEncoderLayer

from fairseq_stack.models.dropout import dropout, kept
from fairseq_stack.models.pos_conv import positions


class LayerStack(TransformerEncoder):
    """fairseq's transformer with its positional convolution, run over chosen layers.

    Frames stay [B, T, D] on the whole way; fairseq goes to [T, B, D] and back.
    """

    def build_encoder_layer(self, args, **kwargs):
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

    def forward(self, x, frames, seats, upto=None):
        """[B, T, D] features and [B] frames to a list of 1 + min(upto, len(seats)) times [B, T, D]."""
        padding = torch.arange(x.size(1), device=x.device) >= frames[:, None]
        if not bool(padding.any()):
            padding = None
        x = x + positions(self.pos_conv, x, padding)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = dropout(x, self.dropout, self.training)

        hidden_states = [x]
        for position, seat in enumerate(seats[:upto], start=1):
            x = self.layers[seat](x, padding)
            last = self.layer_norm_first and position == len(seats)
            hidden_states.append(self.layer_norm(x) if last else x)
        return hidden_states

    def __getstate__(self):
        # fairseq's moving average copies the model. torch's weight norm keeps the weight that it computed last,
        # a node of autograd's graph, which cannot be copied and need not be: the next forward pass computes it anew.
        for module in self.pos_conv.modules():
            if hasattr(module, "weight_g"):
                module.weight = module.weight.detach()
        return self.__dict__


class EncoderLayer(TransformerSentenceEncoderLayer):
    """fairseq's layer: self-attention and feed-forward, each with a residual and a norm before or behind."""

    def __init__(self, *args, activation_fn, **kwargs):
        super().__init__(*args, activation_fn=activation_fn, **kwargs)
        if activation_fn == "gelu":
            self.activation_fn = F.gelu  # the same numbers as fairseq's, which goes to fp32 and back

    def forward(self, x, padding=None):
        """[B, T, D] to [B, T, D]; `padding` [B, T] is true behind an utterance, or None."""
        if self.layer_norm_first:
            x = x + self.drop(self.attend(self.self_attn_layer_norm(x), padding), self.dropout1)
            return x + self.drop(self.feed_forward(self.final_layer_norm(x)), self.dropout3)
        x = self.self_attn_layer_norm(x + self.drop(self.attend(x, padding), self.dropout1))
        return self.final_layer_norm(x + self.drop(self.feed_forward(x), self.dropout3))

    def drop(self, x, module):
        return dropout(x, module.p, self.training)

    def feed_forward(self, x):
        return self.fc2(self.drop(self.activation_fn(self.fc1(x)), self.dropout2))

    def attend(self, x, padding):
        module = self.self_attn
        projections = module.q_proj, module.k_proj, module.v_proj
        weight, bias = (torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias"))
        heads = F.linear(x, weight, bias).unflatten(2, (3, module.num_heads, module.head_dim))
        probability = module.dropout_module.p if self.training else 0.0
        x = attention(*heads.permute(2, 0, 3, 1, 4), padding, probability)
        return module.out_proj(x.transpose(1, 2).flatten(2))


def attention(query, key, value, padding, dropout_probability):
    """Scaled dot-product attention of [B, heads, T, features of a head].

    torch's own on a GPU. On a CPU its kernel is slower than plain products: twice backward in bf16, and it has none
    with dropout.
    """
    if query.is_cuda:
        mask = None if padding is None else ~padding[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_probability)
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(2, 3)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    if not dropout_probability:
        return scores.softmax(3) @ value
    return DroppedAttention.apply(scores, value, *kept(scores.shape, dropout_probability))


class DroppedAttention(torch.autograd.Function):
    """(softmax(scores [B, heads, T, T]) * keep * scale) @ value, which keeps one tensor of that size and a mask.

    Step by step torch keeps three, of every layer.
    """

    @staticmethod
    def forward(ctx, scores, value, keep, scale):
        weights = scores.softmax(3)
        ctx.save_for_backward(weights, value, keep)
        ctx.scale = scale
        return (weights * keep) @ (value * scale)

    @staticmethod
    def backward(ctx, gradient):
        weights, value, keep = ctx.saved_tensors
        gradient = gradient * ctx.scale
        to_value = (weights * keep).transpose(2, 3) @ gradient
        to_weights = (gradient @ value.transpose(2, 3)).mul_(keep)
        to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, 3, weights.dtype)
        return to_scores, to_value, None, None
