"""Head geometry in the standard names, shared by the families that keep K and V for each head."""

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.layers import Rows


def num_layers(config: ConfigFields) -> int:
    """Number of decoder layers; a `layer_types` list must have as many entries."""
    count = config.count("num_hidden_layers", most=MAX_LAYERS)
    kinds = config.names("layer_types")
    if kinds is not None and len(kinds) != count:
        msg = f"config lists {len(kinds)} layer_types for {count} num_hidden_layers"
        raise ConfigError(msg)
    return count


def kv_rows(config: ConfigFields) -> Rows:
    """KV heads and head width; K and V have the same width.

    `num_key_value_heads` absent or null means one KV head for each query head (MHA), `head_dim`
    absent or null means hidden_size / num_attention_heads.
    """
    heads = config.count("num_attention_heads")
    kv_heads = config.optional_count("num_key_value_heads") or heads
    if heads % kv_heads:
        msg = (
            f"config has {heads} num_attention_heads, not a multiple of its {kv_heads} "
            "num_key_value_heads"
        )
        raise ConfigError(msg)
    head_dim = config.optional_count("head_dim") or width_of_a_head(config, heads)
    return Rows(kv_heads, head_dim, head_dim)


def width_of_a_head(config: ConfigFields, heads: int) -> int:
    """hidden_size / num_attention_heads; ConfigError when that is no whole number."""
    hidden_size = config.count("hidden_size")
    width, rest = divmod(hidden_size, heads)
    if rest:
        msg = (
            f"config has hidden_size {hidden_size}, which is not divisible by its {heads} "
            "num_attention_heads"
        )
        raise ConfigError(msg)
    return width
