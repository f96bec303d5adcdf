"""Lightning attention beside full attention: MiniMax-Text-01 (arXiv:2501.08313).

A lightning layer keeps a state of head_dim × head_dim for each head (modeling_minimax.py,
transformers 5.23.0, in the model's dtype).
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention
from kvcalc.families._kinds import FULL, LINEAR, build_layers, layer_kinds
from kvcalc.layers import Layer
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V in full layers, head_dim² values a head in lightning layers (arXiv:2501.08313)"

MODEL_TYPES = frozenset({"minimax", "minimax_text_01"})

UNDERSTANDS = frozenset({"layer_types", "sliding_window"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    """The repository's own class lists a 0 for lightning and a 1 for full attention."""
    listed = config.numbers("attn_type_list")
    if listed is None and config.model_type == "minimax":
        return [LINEAR if index % 2 else FULL for index in range(count)]
    if listed is None or len(listed) != count or not set(listed) <= {0, 1}:
        raise config.wrong("attn_type_list", listed, f"a list of {count} zeros and ones")
    return [FULL if full else LINEAR for full in listed]


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """As they are listed, or alternating."""
    full = full_attention(config)
    width, heads = full.key_dim, config.count("num_attention_heads")
    state = State("lightning", (heads, width, width), splits="heads")
    return build_layers(
        config,
        layer_kinds(config, _kinds),
        {FULL: lambda: full, LINEAR: lambda: state_layer([state])},
    )
