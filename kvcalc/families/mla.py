"""Multi-head latent attention: DeepSeek-V2 (arXiv:2405.04434, section 2.1), V3 and Kimi K2.

A token keeps one compressed latent (`kv_lora_rank`) and one decoupled rotary key
(`qk_rope_head_dim`) in each layer, whatever the number of heads; K and V of the heads are
recomputed from the latent. LongCat-Flash has two attentions, and so two caches, in each layer; the
smallest DeepSeek-VL2 has latent attention switched off and keeps K and V of its heads.
"""

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.families._heads import full_attention, repeat
from kvcalc.families._latent import latent
from kvcalc.layers import Layer

SOURCE = "kv_lora_rank + qk_rope_head_dim values a token and layer (arXiv:2405.04434, table 1)"

MODEL_TYPES = frozenset(
    """
    axk1 deepseek_v2 deepseek_v3 glm4_moe_lite kimi_k2 longcat_flash minicpm3 mistral4 youtu
    youtu_vl
    """.split()
)

_TWO_ATTENTIONS = frozenset({"longcat_flash"})

UNDERSTANDS = frozenset({"kv_lora_rank"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same latent layer, once for each attention."""
    if config.model_type == "deepseek_v2" and config.given("use_mla") is False:
        return repeat(config, full_attention(config))
    return transformers_layers(config)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Likewise; its classes know no attention without a latent."""
    layer = latent(config)
    if config.model_type in _TWO_ATTENTIONS:
        return (layer,) * (2 * config.count("num_layers", most=MAX_LAYERS))
    return repeat(config, layer)
