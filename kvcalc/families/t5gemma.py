"""Encoder–decoders made of Gemma: T5Gemma (arXiv:2504.06225) and T5Gemma 2.

The decoder's window and full layers are those of Gemma 2 and Gemma 3; each keeps K and V of the
encoder's output besides (modeling_t5gemma.py, transformers 5.23.0).
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import FULL, SLIDING, Rule, build_layers, every, layer_kinds
from kvcalc.layers import Layer
from kvcalc.layers.mixed import Combined, CrossAttention

SOURCE = "window and full layers, and K and V of the encoder's output (arXiv:2504.06225)"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "t5_gemma_module": every(2),
        "t5gemma2_decoder": every(6, field="sliding_window_pattern"),
    }
)

MODEL_TYPES = frozenset(RULES)

UNDERSTANDS = frozenset({"layer_types", "sliding_window"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The decoder's layers."""
    full = full_attention(config)
    cross = CrossAttention(kv_heads=full.kv_heads, key_dim=full.key_dim, value_dim=full.value_dim)

    def crossed(layer: Layer) -> Layer:
        return Combined(kind="self_and_cross_attention", members=(layer, cross))

    return build_layers(
        config,
        layer_kinds(config, RULES[config.model_type]),
        {
            FULL: lambda: crossed(full),
            SLIDING: lambda: crossed(windowed(full, config.count("sliding_window"))),
        },
    )
