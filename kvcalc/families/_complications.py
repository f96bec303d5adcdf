"""Config fields that change what a cache keeps: present and not understood means refused."""

from collections.abc import Mapping
from typing import Any

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.units import shown

COMPLICATIONS = {
    "layer_types": "layers of several kinds",
    "layers_block_type": "layers of several kinds",
    "block_types": "layers of several kinds",
    "hybrid_override_pattern": "layers of several kinds",
    "hybrid_layer_pattern": "layers of several kinds",
    "attn_type_list": "layers of several kinds",
    "attn_layer_period": "attention in some layers only",
    "attn_layer_indices": "attention in some layers only",
    "full_attn_idxs": "attention in some layers only",
    "full_attention_interval": "attention in some layers only",
    "linear_attn_config": "linear attention",
    "linear_num_value_heads": "linear attention",
    "mamba_d_state": "a recurrent state",
    "mamba_num_heads": "a recurrent state",
    "ssm_state_size": "a recurrent state",
    "state_size": "a recurrent state",
    "conv_L_cache": "a convolution state",
    "sliding_window": "a sliding window",
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "bidirectional attention",
    "num_kv_shared_layers": "layers that share their KV",
    "kv_source_layers": "layers that share their KV",
    "use_cla": "layers that share their KV",
    "block_configs": "attention that differs from layer to layer",
    "per_layer_config": "attention that differs from layer to layer",
    "num_attention_heads_per_layer": "attention that differs from layer to layer",
    "swa_num_key_value_heads": "window layers with heads of their own",
    "num_swa_key_value_heads": "window layers with heads of their own",
    "sliding_window_layers": "a sliding window",
    "attention_window_size": "a sliding window",
    "conv_window": "a convolution state",
    "num_global_key_value_heads": "global layers with heads of their own",
    "global_head_dim": "global layers with heads of their own",
    "attention_k_eq_v": "K and V in one tensor",
    "attn_config": "attention described in attn_config",
    "multi_query": "heads decided by multi_query",
    "multi_query_attention": "heads decided by multi_query_attention",
    "num_attention_groups": "heads decided by num_attention_groups",
    "kv_lora_rank": "a latent cache",
    "index_head_dim": "an indexer's keys",
    "compress_ratios": "compressed attention",
    "compress_rates": "compressed attention",
    "sparse_attention_config": "sparse attention",
    "cross_attention_layers": "cross attention",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "an encoder",
}

_INACTIVE: tuple[object, ...] = (None, False, 0, "", [], {})


def refuse_unclaimed(
    fields: ConfigFields, config: Mapping[str, Any], *, understood: frozenset[str]
) -> None:
    """Raise UnsupportedError when a complicating field is active that the family does not read."""
    for key, meaning in COMPLICATIONS.items():
        if key in understood:
            continue
        value = fields.given(key)
        if key == "is_encoder_decoder":  # said of a whole, whose family knows what it joins
            value = None if fields.prefix else config.get(key)
        if _active(key, value):
            msg = (
                f"model_type {fields.model_type!r} with {fields.prefix}{key} = {shown(value)} "
                f"means {meaning}, which its family does not cover; deciding field: {key}"
            )
            raise UnsupportedError(msg)


def _active(key: str, value: object) -> bool:
    if key == "layer_types" and isinstance(value, list):
        return any(kind != "full_attention" for kind in value)
    if key == "attn_type_list" and isinstance(value, list):
        return any(kind != 1 for kind in value)  # MiniMax: 1 is softmax attention, 0 lightning
    if key in ("sliding_window", "attention_chunk_size"):
        return value is not None and value is not False  # transformers takes a 0 for a window
    if key == "use_bidirectional_attention" and value == "vision":
        return False  # among the tokens of an image, all of which are kept
    return value not in _INACTIVE
