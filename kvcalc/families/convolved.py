"""Attention whose inputs pass short convolutions: Zaya's compressed convolutional attention
(arXiv:2510.04476) and Inkling.

Beside its K and V, full or over a window, a layer keeps the last inputs of its convolutions
(modeling_zaya.py and modeling_inkling.py, transformers 5.23.0; Inkling's are in float32).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import (
    HYBRID,
    HYBRID_SLIDING,
    Rule,
    all_of,
    build_layers,
    every,
    layer_kinds,
)
from kvcalc.families._states import FLOAT32
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import Combined
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V, and the last inputs of convolutions (arXiv:2510.04476, modeling_inkling.py)"

UNDERSTANDS = frozenset({"layer_types", "sliding_window", "swa_num_key_value_heads"})


def _inkling_kinds(config: ConfigFields, count: int) -> Sequence[str]:
    local = config.numbers("local_layer_ids")
    if local is None:
        return every(6, one=HYBRID, others=HYBRID_SLIDING)(config, count)
    return [HYBRID_SLIDING if index in local else HYBRID for index in range(count)]


def _zaya_states(config: ConfigFields, layer: FullAttention, extra: int) -> tuple[State, ...]:
    del extra
    heads = config.count("num_attention_heads") + layer.kv_heads
    columns = config.count("cca_time0") + config.count("cca_time1") - 2
    return (
        State("conv", (heads, layer.key_dim, columns), splits="heads"),
        State("last values", (layer.kv_heads, layer.key_dim // 2), splits="KV heads"),
    )


def _inkling_states(config: ConfigFields, layer: FullAttention, extra: int) -> tuple[State, ...]:
    columns = config.count("conv_kernel_size") + extra
    kv_heads, head_dim = layer.kv_heads, layer.key_dim
    return (
        State("conv k, v", (kv_heads, 2 * head_dim, columns), FLOAT32, splits="KV heads"),
        State("conv hidden", (config.count("hidden_size"), 2, columns), FLOAT32),
    )


def _window_heads(config: ConfigFields, full: FullAttention) -> FullAttention:
    """Window layers of Inkling have heads of their own."""
    kv_heads = config.optional_count("swa_num_key_value_heads") or full.kv_heads
    head_dim = config.optional_count("swa_head_dim") or full.key_dim
    return FullAttention(kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim)


RULES: Mapping[str, Rule] = MappingProxyType(
    {"inkling_text": _inkling_kinds, "inkling2_text": _inkling_kinds, "zaya": all_of(HYBRID)}
)

States = Callable[[ConfigFields, FullAttention, int], tuple[State, ...]]

MODEL_TYPES = frozenset(RULES)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns."""
    return _layers(config, extra=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns of Inkling's convolutions."""
    return _layers(config, extra=0)


def _layers(config: ConfigFields, *, extra: int) -> tuple[Layer, ...]:
    full = full_attention(config)
    states: States = _zaya_states if config.model_type == "zaya" else _inkling_states

    def with_states(layer: FullAttention, window: int | None) -> Layer:
        attention = windowed(layer, window) if window else layer
        return Combined(
            kind=HYBRID_SLIDING if window else HYBRID,
            members=(attention, state_layer(states(config, layer, extra))),
        )

    return build_layers(
        config,
        layer_kinds(config, RULES[config.model_type]),
        {
            HYBRID: lambda: with_states(full, None),
            HYBRID_SLIDING: lambda: with_states(
                _window_heads(config, full), config.count("sliding_window")
            ),
        },
    )
