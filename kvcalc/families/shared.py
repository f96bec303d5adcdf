"""Layers that reuse the K and V of earlier ones: Gemma 3n and Gemma 4.

The last `num_kv_shared_layers` attend to the cache of the last layer of their kind before them and
keep nothing (configuration_gemma3n.py and configuration_gemma4.py, transformers 5.23.0). Full
layers of Gemma 4 have a head width and, with `attention_k_eq_v`, KV heads of their own.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import FULL, SLIDING, Rule, build_layers, every, layer_kinds
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import NoCache

SOURCE = "layers that share KV keep nothing (configuration_gemma3n.py, configuration_gemma4.py)"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "gemma3n_text": every(5),
        "gemma4_text": every(6),
        "gemma4_unified_text": every(6),
        "diffusion_gemma_text": every(6),
    }
)

MODEL_TYPES = frozenset(RULES)

UNDERSTANDS = frozenset(
    """
    attention_k_eq_v layer_types num_global_key_value_heads num_kv_shared_layers per_layer_config
    sliding_window
    """.split()
)

GLOBAL_HEAD_DIM = 512
"""What Gemma4TextConfig takes for the head width of full layers when a config names none."""

_KEEPS_NOTHING = NoCache(reason="shares an earlier layer's KV")


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Window and full layers, the last of which share."""
    kinds = list(layer_kinds(config, RULES[config.model_type]))
    gemma_3n = config.model_type == "gemma3n_text"
    if not gemma_3n:
        kinds[-1] = FULL  # Gemma4TextConfig makes it so
    shared = config.number("num_kv_shared_layers")
    owners = kinds[: max(len(kinds) - shared, 0)]
    if shared and set(owners) != set(kinds):
        msg = f"config shares {shared} of {len(kinds)} layers, and a kind of them with no owner"
        raise ConfigError(msg)
    sliding = full_attention(config)
    built = build_layers(
        config,
        owners,
        {
            FULL: lambda: sliding if gemma_3n else _global(config, sliding, kinds.index(FULL)),
            SLIDING: lambda: windowed(sliding, config.count("sliding_window")),
        },
    )
    return built + (_KEEPS_NOTHING,) * (len(kinds) - len(built))


def _global(config: ConfigFields, sliding: FullAttention, index: int) -> FullAttention:
    """A full layer: from `per_layer_config`, as transformers saves it, else `global_head_dim`."""
    saved = config.layer(index)
    if saved is not None:
        own_dim = saved.optional_count("head_dim") or sliding.key_dim
        own_heads = saved.optional_count("num_key_value_heads") or sliding.kv_heads
        return FullAttention(kv_heads=own_heads, key_dim=own_dim, value_dim=own_dim)
    head_dim = config.optional_count("global_head_dim")
    if head_dim is None:
        head_dim = GLOBAL_HEAD_DIM
        config.by_rule("global_head_dim", head_dim)
    heads = config.optional_count("num_global_key_value_heads")
    # Classes without the switch (DiffusionGemma) follow the number alone.
    gated = config.get("attention_k_eq_v")
    if heads is None or gated is False or (gated is None and "gemma4" in config.model_type):
        heads = sliding.kv_heads
    return FullAttention(kv_heads=heads, key_dim=head_dim, value_dim=head_dim)
