"""Checks of the fields that describe a HuBERT, from a recipe or from a checkpoint."""

from typing import Any

from fairseq_stack.errors import InputError, check_choice

# Sizes range from 1 to these limits. Larger numbers come from damaged files and would fill the memory.
MOST_LAYERS, LARGEST_WIDTH = 1_000, 100_000
SIZES = {
    "encoder_layers": MOST_LAYERS,
    "encoder_embed_dim": LARGEST_WIDTH,
    "encoder_ffn_embed_dim": LARGEST_WIDTH,
    "encoder_attention_heads": LARGEST_WIDTH,
    "conv_pos": LARGEST_WIDTH,
    "conv_pos_groups": LARGEST_WIDTH,
    "pos_conv_depth": 100,
}
SWITCHES = ("conv_bias", "layer_norm_first", "feature_layer_norm")
PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "dropout_input")
CHOICES = {
    "extractor_mode": ("default", "layer_norm"),
    "activation_fn": ("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear"),
}
# Fields that may be missing, because not every kind of model has them.
DEFAULTS = {"pos_conv_depth": 1, "feature_layer_norm": True}


def check_shape(cfg: Any) -> None:
    """Check all fields of a HuBERT's shape but the CNN's layers, which conv_geometry.parse_conv_layers checks.

    Args:
        cfg: has the fields above as attributes, with fairseq's names. Those in DEFAULTS may be missing.

    Raises:
        InputError: a field is missing or has the wrong type, a size is out of range, a width is not divisible by
            its number of heads or groups, a probability is not between 0 and 1, or a name is unknown.
    """

    def value(name: str) -> Any:
        return getattr(cfg, name, DEFAULTS.get(name))

    for name, largest in SIZES.items():
        if type(value(name)) is not int or not 1 <= value(name) <= largest:
            raise InputError(f"model.{name}={value(name)} must be a whole number from 1 to {largest}")
    for name in ("encoder_attention_heads", "conv_pos_groups"):
        if cfg.encoder_embed_dim % value(name):
            raise InputError(
                f"model.encoder_embed_dim={cfg.encoder_embed_dim} is not divisible by"
                f" model.{name}={value(name)}; choose a divisor"
            )
    for name in SWITCHES:
        if not isinstance(value(name), bool):
            raise InputError(f"model.{name}={value(name)} must be true or false")
    for name in PROBABILITIES:
        if type(value(name)) not in (int, float) or not 0 <= value(name) <= 1:
            raise InputError(f"model.{name}={value(name)} must lie between 0 and 1")
    for name, choices in CHOICES.items():
        check_choice(f"model.{name}", value(name), choices)
