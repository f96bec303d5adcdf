"""Chunked attention alternating with full attention: Llama 4 (modeling_llama4.py, transformers
5.23.0).

Layers with rotary positions attend within chunks of `attention_chunk_size` tokens; every
`no_rope_layer_interval`-th layer has none and attends to everything. Published configs have an
empty `no_rope_layers`, which stands for that rule.
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention
from kvcalc.families._kinds import CHUNKED, FULL, build_layers, every, layer_kinds
from kvcalc.layers import ChunkedAttention, Layer

SOURCE = "chunked layers keep min(tokens, chunk), full layers all (modeling_llama4.py 5.23.0)"

MODEL_TYPES = frozenset({"llama4_text"})

UNDERSTANDS = frozenset({"layer_types", "attention_chunk_size"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    with_rope = config.numbers("no_rope_layers")
    if not with_rope:
        interval = config.optional_count("no_rope_layer_interval") or 4
        return every(interval, others=CHUNKED)(config, count)
    if len(with_rope) != count:
        raise config.wrong("no_rope_layers", with_rope, f"a list of {count} numbers")
    return [CHUNKED if rope else FULL for rope in with_rope]


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Chunked and full layers with the same heads."""
    full = full_attention(config)
    return build_layers(
        config,
        layer_kinds(config, _kinds),
        {
            FULL: lambda: full,
            CHUNKED: lambda: ChunkedAttention(
                kv_heads=full.kv_heads,
                key_dim=full.key_dim,
                value_dim=full.value_dim,
                window=config.count("attention_chunk_size"),
            ),
        },
    )
