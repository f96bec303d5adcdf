"""Full attention in every layer with grouped KV heads: GQA (arXiv:2305.13245), of which MHA and MQA
(arXiv:1911.02150) are the ends.

Every token keeps K and V of each KV head in each layer. The model types are those whose modeling
file in transformers 5.23.0 has no other kind of layer and reads the head geometry from the
standard fields; a run of each stands in the tests.
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, repeat
from kvcalc.layers import Layer

SOURCE = "K and V of every token and KV head (arXiv:2305.13245, section 2)"

MODEL_TYPES = frozenset(
    """
    apertus arcee aria_text bitnet chameleon cohere cosmos3_edge_text diffllama emu3_text_model
    ernie4_5 ernie4_5_moe ernie4_5_vl_moe_text evolla flex_olmo gemma glm glm4 glm4_moe
    glm4v_moe_text glm4v_text glm_ocr_text granite granite4_vision_text granite_docling_text
    granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl_text hy_v3
    hyperclovax idefics internlm3 iquestcoder jais2 llama minimax_m2 molmo2_text nanochat nemotron
    olmo olmo2 olmoe paddleocr_vl_text phi qwen3_vl_text seed_oss solar_open stablelm
    """.split()
)

UNDERSTANDS = frozenset({"use_bidirectional_attention"})
"""Every token is kept, whichever others attend to it."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same layer, once for each decoder layer."""
    return repeat(config, full_attention(config))
