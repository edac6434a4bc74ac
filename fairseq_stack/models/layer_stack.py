"""HuBERT's transformer: fairseq's modules, with a forward pass of its own over chosen layers."""

import torch
import torch.nn.functional as F
from fairseq.models.wav2vec.wav2vec2 import TransformerEncoder, TransformerSentenceEncoderLayer

from fairseq_stack.models.positions import positions


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
        x = F.dropout(x, p=self.dropout, training=self.training)

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

    def forward(self, x, padding=None):
        """[B, T, D] to [B, T, D]; `padding` [B, T] is true behind an utterance, or None."""
        if self.layer_norm_first:
            x = x + self.dropout1(self.attend(self.self_attn_layer_norm(x), padding))
            return x + self.dropout3(self.feed_forward(self.final_layer_norm(x)))
        x = self.self_attn_layer_norm(x + self.dropout1(self.attend(x, padding)))
        return self.final_layer_norm(x + self.dropout3(self.feed_forward(x)))

    def feed_forward(self, x):
        x = self.dropout2(self.activation_fn(self.fc1(x)))
        return self.fc2(x)

    def attend(self, x, padding):
        module = self.self_attn
        projections = module.q_proj, module.k_proj, module.v_proj
        weight, bias = (torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias"))
        heads = F.linear(x, weight, bias).unflatten(2, (3, module.num_heads, module.head_dim))
        dropout = module.dropout_module.p if self.training else 0.0
        x = attention(*heads.permute(2, 0, 3, 1, 4), padding, dropout)
        return module.out_proj(x.transpose(1, 2).flatten(2))


def attention(query, key, value, padding, dropout):
    """Scaled dot-product attention of [B, heads, T, features of a head].

    torch's own on a GPU. On a CPU its kernel is slower than plain products: twice backward in bf16, and it has none
    with dropout.
    """
    if query.is_cuda:
        mask = None if padding is None else ~padding[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(2, 3)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    return F.dropout(scores.softmax(3), dropout, training=dropout > 0) @ value
