"""Multi-head latent attention: DeepSeek-V2 (arXiv:2405.04434, section 2.1), V3 and Kimi K2.

A token keeps one compressed latent (`kv_lora_rank`) and one decoupled rotary key
(`qk_rope_head_dim`) in each layer, whatever the number of heads; K and V of the heads are
recomputed from the latent.
"""

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.families._heads import num_layers
from kvcalc.layers import LatentAttention, Layer

SOURCE = "kv_lora_rank + qk_rope_head_dim values a token and layer (arXiv:2405.04434, table 1)"

MODEL_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "youtu"})

UNDERSTANDS = frozenset({"kv_lora_rank"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same latent layer, once for each decoder layer."""
    latent_dim = config.optional_count("kv_lora_rank")
    if latent_dim is None or config.given("use_mla") is False:
        msg = (
            f"model_type {config.model_type!r} with latent attention switched off is not covered; "
            "deciding fields: kv_lora_rank, use_mla"
        )
        raise UnsupportedError(msg)
    layer = LatentAttention(
        latent_dim=latent_dim,
        rope_dim=config.count("qk_rope_head_dim"),
        num_heads=config.count("num_attention_heads"),
        nope_dim=config.count("qk_nope_head_dim"),
        head_value_dim=config.count("v_head_dim"),
    )
    return (layer,) * num_layers(config)
