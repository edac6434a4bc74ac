"""HuBERT's encoder, the shape of both the teacher and the student.

The modules and so the parameter names are fairseq's: a checkpoint of fairseq's HubertModel fits
without a key map. The forward pass differs in three points. It knows where each utterance ends, so
that an utterance gives the same features alone and in a padded batch. It returns every hidden state.
And it visits the layers that it is told to visit.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from fairseq.models import BaseFairseqModel
from fairseq.models.wav2vec.wav2vec2 import (
    ConvFeatureExtractionModel,
    TransformerEncoder,
    Wav2Vec2Config,
)
from fairseq.modules import GradMultiply, LayerNorm

from fairseq_stack.encoder_shape import check_shape
from fairseq_stack.errors import InputError
from fairseq_stack.lengths import frames_from_samples, parse_conv_layers


class HubertEncoder(BaseFairseqModel):
    """Waveforms to hidden states.

    Args:
        cfg: fairseq's names for the shape: extractor_mode, conv_feature_layers, conv_bias,
            encoder_layers, encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads,
            activation_fn, layer_norm_first, conv_pos, conv_pos_groups and, where the positional
            convolution is several blocks (data2vec), pos_conv_depth, and where no norm is to follow the
            CNN, feature_layer_norm; and for training dropout, attention_dropout, activation_dropout,
            dropout_input, feature_grad_mult.

    Raises:
        InputError: conv_feature_layers is not a list of (channels, kernel, stride), or another field
            cannot be.
    """

    def __init__(self, cfg):
        super().__init__()
        check_shape(cfg)
        try:
            self.conv_layers = parse_conv_layers(cfg.conv_feature_layers)
        except ValueError:
            raise InputError(
                f"model.conv_feature_layers={cfg.conv_feature_layers} is not a list of (channels, kernel, stride)"
            ) from None
        channels = self.conv_layers[-1][0]
        self.feature_extractor = ConvExtractor(self.conv_layers, mode=cfg.extractor_mode, conv_bias=cfg.conv_bias)
        self.feature_grad_mult = cfg.feature_grad_mult
        # HuBERT has a norm between the CNN and the projection, DistilHuBERT has none.
        self.layer_norm = LayerNorm(channels) if getattr(cfg, "feature_layer_norm", True) else nn.Identity()
        self.post_extract_proj = (
            nn.Linear(channels, cfg.encoder_embed_dim) if channels != cfg.encoder_embed_dim else None
        )
        self.dropout_input = nn.Dropout(cfg.dropout_input)
        self.encoder = LayerStack(
            Wav2Vec2Config(
                encoder_layers=cfg.encoder_layers,
                encoder_embed_dim=cfg.encoder_embed_dim,
                encoder_ffn_embed_dim=cfg.encoder_ffn_embed_dim,
                encoder_attention_heads=cfg.encoder_attention_heads,
                activation_fn=cfg.activation_fn,
                layer_norm_first=cfg.layer_norm_first,
                conv_pos=cfg.conv_pos,
                conv_pos_groups=cfg.conv_pos_groups,
                pos_conv_depth=getattr(cfg, "pos_conv_depth", 1),
                dropout=cfg.dropout,
                attention_dropout=cfg.attention_dropout,
                activation_dropout=cfg.activation_dropout,
                # A dropped layer would leave a gap in the hidden states.
                encoder_layerdrop=0.0,
            )
        )

    def frames(self, samples):
        """Frames of `samples` samples (an int, or an integer tensor)."""
        return frames_from_samples(samples, self.conv_layers)

    def features(self, waveforms, lengths):
        """[B, S] samples and [B] lengths to the CNN's features [B, C, T]."""
        if self.feature_grad_mult == 0:
            with torch.no_grad():
                return self.feature_extractor(waveforms, lengths)
        features = self.feature_extractor(waveforms, lengths)
        return features if self.feature_grad_mult == 1.0 else GradMultiply.apply(features, self.feature_grad_mult)

    def encode(self, features, lengths, seats, upto=None, mask=None):
        """Run the layers in `seats` and return what goes in and what comes out of them.

        Args:
            features: [B, C, T], the CNN's.
            lengths: [B], the samples of each utterance.
            seats: indices of the layers to run, in order; all layers that the model has in use.
            upto: run only the first `upto` of them (default: all).
            mask: [B, T] bool, the frames to replace by `mask_emb` before the transformer, for a model
                that has one (default: none).

        Returns:
            hidden_states: list of [B, T, D]; 0 is the input of the first layer and i the output of
                the i-th, as transformers and s3prl count. In a pre-norm encoder the output of the
                last layer in use has passed the final layer norm.
            frames: [B], the frames of each utterance; what lies behind is padding.
        """
        frames = self.frames(lengths)
        x = self.layer_norm(features.transpose(1, 2))
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        x = self.dropout_input(x)
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_emb.type_as(x), x)
        return self.encoder(x, frames, seats, upto), frames


class ConvExtractor(ConvFeatureExtractionModel):
    """fairseq's extractor, with the group norm's statistics taken over each utterance's own frames.

    fairseq, transformers and s3prl let the group norm of the `default` mode run over the padding
    too, so that features depend on what else is in the batch. Without padding all agree.
    """

    def __init__(self, conv_layers, mode, conv_bias):
        super().__init__(conv_layers=conv_layers, mode=mode, conv_bias=conv_bias)
        self.shapes = conv_layers
        self.has_group_norm = mode == "default"

    def forward(self, waveforms, lengths):
        """[B, S] samples and [B] lengths to [B, C, T] features."""
        x = waveforms.unsqueeze(1)
        blocks = list(self.conv_layers)
        if self.has_group_norm and bool((lengths < waveforms.size(1)).any()):
            conv, dropout, norm, activation = blocks.pop(0)
            frames = frames_from_samples(lengths, self.shapes[:1])
            x = activation(masked_group_norm(dropout(conv(x)), frames, norm))
        for block in blocks:
            x = block(x)
        return x


def masked_group_norm(x, frames, norm):
    """Normalise each channel of [B, C, T] over the first frames[b] frames, in fp32."""
    valid = (torch.arange(x.size(2), device=x.device) < frames[:, None])[:, None]
    wide = x.float() * valid
    count = frames[:, None, None]
    mean = wide.sum(2, keepdim=True) / count
    variance = ((wide - mean) * valid).pow(2).sum(2, keepdim=True) / count
    normed = (wide - mean) * torch.rsqrt(variance + norm.eps)
    return (normed * norm.weight.float()[:, None] + norm.bias.float()[:, None]).type_as(x)


class LayerStack(TransformerEncoder):
    """fairseq's transformer with its positional convolution, run over chosen layers."""

    def forward(self, x, frames, seats, upto=None):
        """[B, T, D] features and [B] frames to a list of 1 + min(upto, len(seats)) times [B, T, D]."""
        padding = torch.arange(x.size(1), device=x.device) >= frames[:, None]
        if not bool(padding.any()):
            padding = None
        x = x + self.positions(x, padding)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = F.dropout(x, p=self.dropout, training=self.training)

        hidden_states = [x]
        x = x.transpose(0, 1)
        for position, seat in enumerate(seats[:upto], start=1):
            x, _ = self.layers[seat](x, self_attn_padding_mask=padding)
            last = self.layer_norm_first and position == len(seats)
            hidden_states.append((self.layer_norm(x) if last else x).transpose(0, 1))
        return hidden_states

    def __getstate__(self):
        # fairseq's moving average copies the model. torch's weight norm keeps the weight that it computed last,
        # a node of autograd's graph, which cannot be copied and need not be: the next forward pass computes it anew.
        for module in self.pos_conv.modules():
            if hasattr(module, "weight_g"):
                module.weight = module.weight.detach()
        return self.__dict__

    def positions(self, x, padding):
        """The positional convolution of [B, T, D]; `padding` [B, T] is true behind an utterance, or None."""
        deep = isinstance(self.pos_conv[0], nn.Sequential)
        x = x.transpose(1, 2)
        for block in self.pos_conv if deep else [self.pos_conv]:
            # Each block of a deep one would see what the block before it made of the padding.
            x = block(x if padding is None else x.masked_fill(padding[:, None], 0.0))
        return x.transpose(1, 2)
