"""Latent attention in the standard names, shared by the families that keep a latent."""

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.layers import LatentAttention


def latent(config: ConfigFields, *, rope: bool = True) -> LatentAttention:
    """One latent layer, with a rotary key unless its type has none; UnsupportedError when a config
    switches latent attention off.
    """
    latent_dim = config.optional_count("kv_lora_rank")
    if latent_dim is None or config.given("use_mla") is False:
        msg = (
            f"model_type {config.model_type!r} with latent attention switched off is not covered; "
            "deciding fields: kv_lora_rank, use_mla"
        )
        raise UnsupportedError(msg)
    return LatentAttention(
        latent_dim=latent_dim,
        rope_dim=config.count("qk_rope_head_dim") if rope else 0,
        num_heads=config.count("num_attention_heads"),
        nope_dim=config.count("qk_nope_head_dim"),
        head_value_dim=config.optional_count("v_head_dim") or config.count("qk_nope_head_dim"),
    )
