"""HuBERT's encoder, the shape of both the teacher and the student.

The modules and so the parameter names are fairseq's: a checkpoint of fairseq's HubertModel fits
without a key map. The forward pass differs in three points. It knows where each utterance ends, so
that an utterance gives the same features alone and in a padded batch. It returns every hidden state.
And it visits the layers that it is told to visit.
"""

import torch
import torch.nn as nn
from fairseq.models import BaseFairseqModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.modules import GradMultiply, LayerNorm

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_extractor import ConvExtractor
from fairseq_stack.models.conv_geometry import frames_from_samples, parse_conv_layers
from fairseq_stack.models.layer_stack import LayerStack
from fairseq_stack.models.shape import check_shape


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
