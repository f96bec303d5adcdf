"""Baichuan-M1: attention over K and V that pass a short convolution, with window layers that have
heads of their own.

Beside its cache, full or over a window, each layer keeps the last `conv_window` - 1 rows of K and V
from before the convolution, in the model's dtype (`last_k` and `last_v` in the repository's
modeling_baichuan.py, `LastKVCacheManager` in baichuan-inc/vllm models/baichuan_m1.py).
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import num_layers, width_of_a_head, windowed
from kvcalc.families._kinds import HYBRID, HYBRID_SLIDING, build_layers
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import Combined
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V, and the last rows from before their convolution (modeling_baichuan.py)"

MODEL_TYPES = frozenset({"baichuan_m1"})

UNDERSTANDS = frozenset({"sliding_window"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Full attention, but a window in the `sliding_window_layers`."""
    window = config.numbers("sliding_window_layers")
    if window is None:
        raise config.wrong("sliding_window_layers", window, "a list of layers")
    return build_layers(
        config,
        [HYBRID_SLIDING if index in window else HYBRID for index in range(num_layers(config))],
        {HYBRID: lambda: _full(config), HYBRID_SLIDING: lambda: _windowed(config)},
    )


def _full(config: ConfigFields) -> Layer:
    full = _attention(config, "num_attention_heads", "num_key_value_heads")
    return Combined(kind=HYBRID, members=(full, _last_rows(config, full)))


def _windowed(config: ConfigFields) -> Layer:
    own = _attention(config, "num_swa_attention_heads", "num_swa_key_value_heads")
    window = windowed(own, config.count("sliding_window"))
    return Combined(kind=HYBRID_SLIDING, members=(window, _last_rows(config, own)))


def _attention(config: ConfigFields, heads_field: str, kv_heads_field: str) -> FullAttention:
    """Heads that together are as wide as the model, whatever `head_dim` says."""
    width = width_of_a_head(config, config.count(heads_field))
    return FullAttention(kv_heads=config.count(kv_heads_field), key_dim=width, value_dim=width)


def _last_rows(config: ConfigFields, layer: FullAttention) -> Layer:
    rows = config.count("conv_window") - 1
    shape = (layer.kv_heads, layer.key_dim + layer.value_dim, rows)
    return state_layer([State("last k, v", shape, splits="KV heads")])
