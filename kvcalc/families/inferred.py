"""Model types that nobody listed, when their fields say everything.

A config that states depth, heads, KV heads and head width in the standard names, and has no field
of a known complication besides `layer_types` of full and window layers, is a plain decoder. What is
sized so is marked: no model of the type was run.
"""

import re
from collections.abc import Mapping
from typing import Any

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import FULL, SLIDING, all_of, build_layers, layer_kinds
from kvcalc.layers import Layer

SOURCE = "inferred from the fields alone: K and V of every token and KV head (arXiv:2305.13245)"

MODEL_TYPES: frozenset[str] = frozenset()

UNDERSTANDS = frozenset({"layer_types", "sliding_window"})

_NEEDED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")

_SUSPECT = (
    r"window|chunk|lora_rank|mamba|ssm|state|conv|linear_|recurr|cross|encoder|compress|shar(e_|ed_kv)"
    r"|index|block_|latent|kv_(?!heads)|_kv_|mla|no_rope|layer_group|hybrid|pattern|memory|prompt"
    r"|local|global|cycles|per_layer|swa|attn_type|attention_type|sparse_att|v_head|attn_mod"
)
"""Words in the names of fields by which some architecture changes what it keeps."""

_HARMLESS = frozenset({"layer_types", "sliding_window", "num_key_value_heads", "use_cache"})


def claims(data: Mapping[str, Any]) -> bool:
    """Whether a config's fields say everything, and none might mean more."""
    if any(not isinstance(data.get(key), int) for key in _NEEDED):
        return False
    suspected = any(
        value not in (None, False, 0, "", [], {}) and re.search(_SUSPECT, key)
        for key, value in data.items()
        if isinstance(key, str) and key not in _HARMLESS
    )
    slides = data.get("sliding_window") is not None
    return not suspected and (not slides or data.get("layer_types") is not None)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Full and window layers with the same heads."""
    full = full_attention(config)
    return build_layers(
        config,
        layer_kinds(config, all_of(FULL)),
        {
            FULL: lambda: full,
            SLIDING: lambda: windowed(full, config.count("sliding_window")),
        },
    )
