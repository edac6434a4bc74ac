"""HuBERT's encoder, which both the teacher and the student use.

The modules and the names of the parameters are fairseq's, so a checkpoint of fairseq's HubertModel loads
without a key map. The forward pass differs in three points:

- It uses the length of each utterance, so an utterance has the same features alone and in a padded batch.
- It returns every hidden state.
- It runs only the layers that its caller chooses.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from fairseq.models import BaseFairseqModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.modules import GradMultiply, LayerNorm
from torch import Tensor

from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_extractor import ConvExtractor
from fairseq_stack.models.conv_geometry import Count, frames_from_samples, parse_conv_layers
from fairseq_stack.models.layer_stack import LayerStack
from fairseq_stack.models.shape import check_shape


class HubertEncoder(BaseFairseqModel):
    """A model that computes hidden states from waveforms.

    Args:
        cfg: has fields with fairseq's names. The shape: extractor_mode, conv_feature_layers, conv_bias,
            encoder_layers, encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads,
            activation_fn, layer_norm_first, conv_pos and conv_pos_groups. Optional: pos_conv_depth, the
            blocks of the positional convolution (data2vec has several), and feature_layer_norm, false for
            no norm after the CNN. For training: dropout, attention_dropout, activation_dropout,
            dropout_input and feature_grad_mult.

    Raises:
        InputError: conv_feature_layers is not a list of (channels, kernel, stride), or another field has
            a wrong value.
    """

    mask_emb: nn.Parameter  # only models that mask frames have it

    def __init__(self, cfg: Any) -> None:
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

    def frames(self, samples: Count) -> Count:
        """The number of frames of `samples` samples (an int, or an integer tensor)."""
        return frames_from_samples(samples, self.conv_layers)

    def features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Compute the CNN's features [B, C, T] from samples [B, S] and lengths [B]."""
        if self.feature_grad_mult == 0:
            with torch.no_grad():
                return self.feature_extractor(waveforms, lengths)
        features = self.feature_extractor(waveforms, lengths)
        if self.feature_grad_mult == 1.0:
            return features
        return cast(Tensor, GradMultiply.apply(features, self.feature_grad_mult))

    def encode(
        self,
        features: Tensor,
        lengths: Tensor,
        seats: Sequence[int],
        upto: int | None = None,
        mask: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Run the layers in `seats` and return their inputs and outputs.

        Args:
            features: [B, C, T], of the CNN.
            lengths: [B], the number of samples of each utterance.
            seats: indices of all layers in use, in order.
            upto: run only the first `upto` of them (default: all).
            mask: [B, T] bool, the frames to replace with `mask_emb` before the transformer, for a model
                that has one (default: none).

        Returns:
            hidden_states: list of [B, T, D]. The first is the input of the first layer and the i-th after it
                the output of the i-th layer, as in transformers and s3prl. In a pre-norm encoder the final
                layer norm has been applied to the output of the last layer in use.
            frames: [B], the number of frames of each utterance; the frames after them are padding.
        """
        frames = self.frames(lengths)
        x = self.layer_norm(features.transpose(1, 2))
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        x = self.dropout_input(x)
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_emb.type_as(x), x)
        return self.encoder(x, frames, seats, upto), frames
