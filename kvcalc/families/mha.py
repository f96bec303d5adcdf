"""Full attention of models from before grouped heads: as many KV heads as query heads.

Multi-head attention (arXiv:1706.03762, section 3.2.2). The modeling files of these types in
transformers 5.23.0 know neither `num_key_value_heads` nor `head_dim`: a config that has them and
means something else by them is refused.
"""

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.families._heads import kv_rows, num_layers, width_of_a_head
from kvcalc.layers import FullAttention, Layer

SOURCE = "K and V of every token and head (arXiv:1706.03762, section 3.2.2)"

MODEL_TYPES = frozenset({"bloom", "gpt2", "gpt_neox", "gptj", "opt", "persimmon"})

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same layer, once for each decoder layer."""
    heads = config.count("num_attention_heads")
    head_dim = width_of_a_head(config, heads)
    if kv_rows(config) != (heads, head_dim, head_dim):
        msg = (
            f"model_type {config.model_type!r} has {heads} KV heads of {head_dim}, but its config "
            "says otherwise; deciding fields: num_key_value_heads, head_dim"
        )
        raise UnsupportedError(msg)
    layer = FullAttention(kv_heads=heads, key_dim=head_dim, value_dim=head_dim)
    return (layer,) * num_layers(config)
