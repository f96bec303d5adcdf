"""Tiny random models of real architectures, built with transformers itself."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 8

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}

EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
}

LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}


PARTICULAR: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
}
"""What a model type insists on besides the common shape."""


def tiny_config(model_type: str, **overrides: Any) -> dict[str, Any]:
    """A config.json of a small model of this type, holding only fields its class declares."""
    declared = AutoConfig.for_model(model_type)
    wanted = SHAPE | EXPERTS | (LATENT if hasattr(declared, "kv_lora_rank") else {})
    if getattr(declared, "head_dim", None) and not hasattr(declared, "kv_lora_rank"):
        wanted |= {"head_dim": 12}
    if hasattr(declared, "sliding_window"):
        wanted |= {"sliding_window": WINDOW}
    fields = {key: value for key, value in wanted.items() if hasattr(declared, key)}
    particular = PARTICULAR.get(model_type, {})
    return {"model_type": model_type} | fields | particular | overrides


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model with random weights, on the CPU."""
    torch.manual_seed(0)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **fields)
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
