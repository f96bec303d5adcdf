"""Full attention in every layer with grouped KV heads: GQA (arXiv:2305.13245), of which MHA and MQA
(arXiv:1911.02150) are the ends.

Every token keeps K and V of each KV head in each layer. The model types are those whose modeling
file in transformers 5.23.0 has no other kind of layer and reads the head geometry from the
standard fields; a run of each stands in the tests.
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import kv_rows, num_layers
from kvcalc.layers import FullAttention, Layer

SOURCE = "K and V of every token and KV head (arXiv:2305.13245, section 2)"

MODEL_TYPES = frozenset(
    """
    apertus arcee bitnet cohere ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 glm4_moe granite
    granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 jais2 llama
    minimax_m2 nanochat nemotron olmo olmo2 olmoe phi seed_oss solar_open stablelm
    """.split()
)

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same layer, once for each decoder layer."""
    heads, key_dim, value_dim = kv_rows(config)
    layer = FullAttention(kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    return (layer,) * num_layers(config)
