"""Head geometry in the standard names, shared by the families that keep K and V for each head."""

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.layers import FullAttention, Layer, Rows, SlidingAttention


def num_layers(config: ConfigFields) -> int:
    """Number of decoder layers."""
    return config.count("num_hidden_layers", most=MAX_LAYERS)


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


def full_attention(config: ConfigFields) -> FullAttention:
    """A layer that keeps every token, with the standard heads."""
    heads, key_dim, value_dim = kv_rows(config)
    return FullAttention(kv_heads=heads, key_dim=key_dim, value_dim=value_dim)


def windowed(layer: FullAttention, window: int) -> SlidingAttention:
    """The same heads over a window."""
    return SlidingAttention(
        kv_heads=layer.kv_heads, key_dim=layer.key_dim, value_dim=layer.value_dim, window=window
    )


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


def multi_head(config: ConfigFields) -> FullAttention:
    """As many KV heads as query heads, each hidden_size / num_attention_heads wide.

    For classes that know neither `num_key_value_heads` nor `head_dim`: UnsupportedError when a
    config has them and they say otherwise.
    """
    heads = config.count("num_attention_heads")
    head_dim = width_of_a_head(config, heads)
    if kv_rows(config) != (heads, head_dim, head_dim):
        msg = (
            f"model_type {config.model_type!r} has {heads} KV heads of {head_dim}, but its config "
            "says otherwise; deciding fields: num_key_value_heads, head_dim"
        )
        raise UnsupportedError(msg)
    return FullAttention(kv_heads=heads, key_dim=head_dim, value_dim=head_dim)


def repeat(config: ConfigFields, layer: Layer) -> tuple[Layer, ...]:
    """The same layer, once for each decoder layer; ConfigError when a config lists other than that
    many `layer_types`.
    """
    count = num_layers(config)
    listed = config.given("layer_types")
    if isinstance(listed, list) and len(listed) != count:
        msg = f"config lists {len(listed)} layer_types for {count} num_hidden_layers"
        raise ConfigError(msg)
    return (layer,) * count
