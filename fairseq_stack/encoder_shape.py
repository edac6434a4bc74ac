"""What the fields that describe a HuBERT may be, wherever they come from: a recipe or a checkpoint."""

from fairseq_stack.errors import InputError, check_choice

SIZES = (
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "conv_pos",
    "conv_pos_groups",
)
SWITCHES = ("conv_bias", "layer_norm_first")
PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "dropout_input")
CHOICES = {
    "extractor_mode": ("default", "layer_norm"),
    "activation_fn": ("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear"),
}


def check_shape(cfg):
    """Check everything but the CNN's layers, which lengths.parse_conv_layers reads.

    Args:
        cfg: has the fields above as attributes, in fairseq's names.

    Raises:
        InputError: a field is missing or of another type, a size is not positive, sizes do not divide,
            a probability is none, or a name is unknown.
    """
    for name in SIZES:
        size = getattr(cfg, name, None)
        if type(size) is not int or size < 1:
            raise InputError(f"model.{name}={size} must be a whole number of 1 or more")
    for name in ("encoder_attention_heads", "conv_pos_groups"):
        if cfg.encoder_embed_dim % getattr(cfg, name):
            raise InputError(
                f"model.encoder_embed_dim={cfg.encoder_embed_dim} is not divisible by"
                f" model.{name}={getattr(cfg, name)}; choose a divisor"
            )
    for name in SWITCHES:
        if not isinstance(getattr(cfg, name, None), bool):
            raise InputError(f"model.{name}={getattr(cfg, name, None)} must be true or false")
    for name in PROBABILITIES:
        probability = getattr(cfg, name, None)
        if not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise InputError(f"model.{name}={probability} must lie between 0 and 1")
    for name, choices in CHOICES.items():
        check_choice(f"model.{name}", getattr(cfg, name, None), choices)
