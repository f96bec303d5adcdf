"""Full attention of models from before grouped heads: as many KV heads as query heads.

Multi-head attention (arXiv:1706.03762, section 3.2.2). The modeling files of these types in
transformers 5.23.0 know neither `num_key_value_heads` nor `head_dim`: a config that has them and
means something else by them is refused.
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import multi_head, repeat
from kvcalc.layers import Layer

SOURCE = "K and V of every token and head (arXiv:1706.03762, section 3.2.2)"

MODEL_TYPES = frozenset(
    """
    biogpt bloom codegen ctrl git gpt-sw3 gpt2 gpt_neox gpt_neox_japanese gptj
    kosmos_2_5_text_model kosmos_2_text_model opt persimmon xglm xlm
    """.split()
)

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same layer, once for each decoder layer."""
    return repeat(config, multi_head(config))
