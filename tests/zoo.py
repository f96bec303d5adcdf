"""A tiny random model of every type that transformers can generate text with, run on the CPU.

What its cache holds after a prompt and a few decoded tokens is the truth that sizes are held to.
"""

import contextlib
import copy
import dataclasses
import itertools
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 8

MAPPINGS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "itt": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "s2s": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
}

ENCODER_TOKENS = 11
VISION = "vision tokens"


class Case(NamedTuple):
    """One tiny model: what its config.json says, and how long its encoder side is when run."""

    mapping: str
    model_type: str
    variation: str
    config: dict[str, Any]
    encoder_tokens: int


class Held(NamedTuple):
    """Bytes of unique storages, by decoder layer."""

    layers: list[int]
    total: int
    after_prefill: list[int]


# The names that configurations give to one quantity. The first word is how we call it.
NAMES: dict[str, str] = {
    "vocab": "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"
    " decoder_vocab_size unpadded_vocab_size audio_vocab_size t2u_vocab_size char_vocab_size"
    " encoder_hash_byte_group_vocab",
    "hidden": "hidden_size d_model n_embd emb_dim embed_dim dim embedding_size"
    " input_embedding_size output_embedding_size word_embed_proj_dim lru_width"
    " hidden_dim encoder_hidden_size vision_hidden_size hidden_size_global",
    "joined": "text_hidden_size out_hidden_size output_dim adapter_out_dim",
    "inner": "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim dff dim_ff"
    " d_inner mlp_dim ffn_hidden_size intermediate_size_mlp feed_forward_size"
    " dense_intermediate_size prompt_mid_dim",
    "layers": "num_hidden_layers n_layer n_layers num_layers layers decoder_layers encoder_layers"
    " num_decoder_layers num_encoder_layers depth num_blocks",
    "heads": "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"
    " decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
    " swa_num_attention_heads num_sliding_attention_heads",
    "kv_heads": "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads"
    " num_global_key_value_heads",
    "head_dim": "head_dim kv_channels d_kv d_head attention_head_size dim_head",
    "positions": "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions"
    " max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings",
    "window": "sliding_window sliding_window_size attention_chunk_size attention_window_size"
    " keep_window_size window_size",
    "expert": "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
    " expert_ffn_hidden_size moe_shared_expert_intermediate_size"
    " shared_experts_intermediate_size share_expert_dim",
    "experts": "num_experts num_local_experts n_routed_experts moe_num_experts",
    "experts_per_token": "num_experts_per_tok moe_k moe_topk num_experts_per_token moe_top_k",
    "one": "n_group topk_group num_expert_group n_shared_experts num_shared_experts"
    " moe_num_shared_experts first_k_dense_replace num_dense_layers zero_expert_num",
    "zero": "num_nextn_predict_layers",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank o_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
    "index_dim": "index_head_dim indexer_head_dim",
    "index_heads": "index_n_heads indexer_n_heads",
    "index_topk": "index_topk",
    "kernel": "conv_kernel mamba_d_conv linear_conv_kernel_dim conv1d_width conv_kernel_size"
    " short_conv_kernel_size conv_L_cache",
    "state": "state_size mamba_d_state ssm_state_size",
    "ssm_heads": "mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads"
    " linear_num_value_heads",
    "ssm_key_heads": "linear_num_key_heads",
    "ssm_head_dim": "mamba_d_head mamba_head_dim linear_head_dim linear_value_head_dim",
    "ssm_key_dim": "linear_key_head_dim",
    "groups": "n_groups mamba_n_groups mamba_ngroups",
    "chunk": "chunk_size mamba_chunk_size",
    "image": "image_size",
    "patch": "patch_size",
}

SIZES: dict[str, dict[str, int]] = {
    "base": {
        "vocab": 64,
        "hidden": 32,
        "joined": 32,  # the width at which a tower meets the text
        "inner": 48,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 12,
        "positions": 256,
        "window": WINDOW,
        "expert": 16,
        "experts": 4,
        "experts_per_token": 2,
        "one": 1,
        "zero": 0,
        "kv_rank": 20,
        "q_rank": 12,
        "rope_dim": 8,
        "nope_dim": 4,
        "value_dim": 10,
        "index_dim": 14,
        "index_heads": 2,
        "index_topk": 4,
        "kernel": 4,
        "state": 6,
        "ssm_heads": 4,
        "ssm_key_heads": 2,
        "ssm_head_dim": 16,
        "ssm_key_dim": 10,
        "groups": 2,
        "chunk": 8,
        "image": 16,
        "patch": 8,
    },
}
SIZES["wide"] = SIZES["base"] | {
    "hidden": 128,
    "joined": 128,
    "layers": 7,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 20,
    "window": 5,
    "kv_rank": 28,
    "rope_dim": 12,
    "nope_dim": 8,
    "value_dim": 14,
    "index_dim": 18,
    "kernel": 3,
    "state": 10,
    "ssm_heads": 8,
    "ssm_key_heads": 4,
    "ssm_head_dim": 32,
    "ssm_key_dim": 12,
    "groups": 4,
}
SIZES["one KV head"] = SIZES["base"] | {
    "hidden": 48,
    "joined": 48,
    "layers": 13,  # more than two periods of most patterns
    "kv_heads": 1,
    "head_dim": 16,
    "ssm_head_dim": 24,
    "state": 8,
    "groups": 1,
}

QUANTITY = {name: quantity for quantity, names in NAMES.items() for name in names.split()}

TOWERS = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "inner": 48}
"""Sizes of the vision and audio parts, which text alone never runs."""

TEXT_PARTS = set(
    "text_config decoder encoder vlm_config attn_config ffn_config"
    " encoder_config decoder_config global_config".split()
)

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def pattern(sizes, *kinds):
    """One kind for each layer, repeating."""
    return [kinds[layer % len(kinds)] for layer in range(sizes["layers"])]


def sections(dim, **rope):
    """Rotary parameters whose three sections add up to half of the rotated width."""
    third = dim // 2 // 3
    return {
        "rope_parameters": DEFAULT_ROPE
        | rope
        | {"mrope_section": [dim // 2 - 2 * third] + 2 * [third]}
    }


def narrow(sizes):
    """The head width of types that have no field for it."""
    return sizes["hidden"] // sizes["heads"]


def dots3_note_text(sizes):
    """Sliding layers have ranks and heads of their own, which are large unless set."""
    return {
        "head_dim": sizes["nope_dim"] + sizes["rope_dim"],
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 10,
        "swa_kv_lora_rank": sizes["kv_rank"] + 4,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 6,
        "swa_v_head_dim": 10,
    }


def gemma4(sizes):
    """Full layers have a head width of their own, 512 unless set; the last layers share KV."""
    kinds = pattern(sizes, "sliding_attention", "full_attention")
    return {
        "global_head_dim": sizes["head_dim"] + 4,
        "layer_types": [*kinds[:-1], "full_attention"],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
    }


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "image_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "projection_dim": 32,
}
"""Stands in for vision models of timm, which are not installed."""


# What a type needs besides the sizes; by the model_type of the (sub-)configuration it stands in.
PARTICULAR: dict[str, Any] = {
    "bailing_hybrid": lambda s: {"layer_group_size": 3},
    "bamba": lambda s: {"attn_layer_indices": [1, s["layers"] - 1]},
    "blt": lambda s: {"encoder_config": {"num_hidden_layers": 2}},
    "chameleon": lambda s: {"vocabulary_map": {"<image>": 40, "IMGIMGBA": 41}},
    "chameleon_vqgan": lambda s: {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "resolution": 16,
        "latent_channels": 32,
        "num_embeddings": 16,
        "num_res_blocks": 1,
    },
    "codegen": lambda s: {"rotary_dim": 4},
    "cohere_compass_text": lambda s: {
        "layer_types": pattern(s, "sliding_attention", "full_attention"),
        "rope_parameters": {
            "sliding_attention": DEFAULT_ROPE | {"mrope_section": [2, 1, narrow(s) // 2 - 3]},
            "full_attention": None,
        },
    },
    "cosmos3_edge_text": lambda s: sections(s["head_dim"]),
    "dbrx": lambda s: {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": lambda s: {"mlp_layer_types": pattern(s, "dense", "sparse")},
    "deepseek_v4": lambda s: {
        "layer_types": pattern(
            s, "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"
        ),
        "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
        "num_key_value_heads": 1,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
        "hc_mult": 2,
    },
    "diffllama": lambda s: {"num_key_value_heads": max(s["kv_heads"], 2)},
    "dots3_note_text": dots3_note_text,
    "dots3_note_vision_encoder": lambda s: {
        "mlp_layer_types": ["dense", "dense"],
        "adapter_in_dim": s["hidden"],
    },
    "diffusion_gemma_text": lambda s: {"global_head_dim": s["head_dim"] + 4, "top_k_experts": 2},
    "diffusion_gemma": lambda s: {"canvas_length": 1},  # a canvas is a decoded token here
    "dots3_note_audio_encoder": lambda s: {
        "adapter_input_size": s["hidden"],
        "downsample_hidden_size": 8,
    },
    "encoder-decoder": lambda s: {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "emu3": lambda s: {"vocabulary_map": {"<image>": 40, "<|extra_200|>": 41}},
    "emu3_vqgan": lambda s: {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "codebook_size": 16,
    },
    "ernie4_5_vl_moe_text": lambda s: {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": DEFAULT_ROPE | {"mrope_section": [1, 1, narrow(s) // 2 - 2]},
    },
    "falcon_h1": lambda s: {"mamba_d_ssm": s["ssm_heads"] * s["ssm_head_dim"]},
    "fast_vlm": lambda s: {"vision_config": CLIP},
    "florence_vision": lambda s: {
        "depths": [1, 1],
        "embed_dim": [32, 32],
        "num_heads": [4, 4],
        "num_groups": [4, 4],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "projection_dim": 32,
    },
    "gemma3n_text": lambda s: {
        "layer_types": pattern(s, "sliding_attention", "full_attention"),
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * s["layers"],
    },
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "glm4v_text": lambda s: sections(narrow(s)),
    "glm4v_moe_text": lambda s: sections(narrow(s), partial_rotary_factor=1.0),
    "glm5_next_text": lambda s: {"index_kpool": 2, "qk_rope_head_dim": 0, "hc_mult": 2},
    "glm_ocr_text": lambda s: sections(narrow(s)),
    "gpt_neo": lambda s: {
        "attention_types": [[["global", "local"], s["layers"] // 2], [["global"], s["layers"] % 2]]
    },
    "gptj": lambda s: {"rotary_dim": 4},
    "granite4_vision": lambda s: {
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
    },
    "granitemoehybrid": lambda s: {"layer_types": pattern(s, "mamba", "attention", "mamba")},
    "helium": lambda s: {"head_dim": narrow(s)},
    "hrm_text": lambda s: {"num_hidden_layers": s["layers"] // 2, "L_cycles": 2},
    "hunyuan_vl_text": lambda s: sections(s["head_dim"]),
    "inkling_vision": lambda s: {"n_layers": 8},
    "inkling_text": lambda s: {
        "layer_types": pattern(s, "hybrid_sliding", "hybrid"),
        "swa_head_dim": s["head_dim"] + 2,
    },
    "janus_vqgan": lambda s: {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "latent_channels": 32,
        "num_embeddings": 16,
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    },
    "janus_vision_model": lambda s: {"projection_dim": 32},
    "jamba": lambda s: {"attn_layer_period": 3, "attn_layer_offset": 1},
    "kimi_linear": lambda s: {
        "layer_types": pattern(s, "linear_attention", "full_attention", "linear_attention")
    },
    "lfm2": lambda s: {"layer_types": pattern(s, "conv", "full_attention")},
    "lfm2_moe": lambda s: {"layer_types": pattern(s, "conv", "full_attention")},
    "lfm3": lambda s: {"layer_types": pattern(s, "conv", "full_attention", "sliding_attention")},
    "led": lambda s: {"attention_window": 8},
    "longcat_flash": lambda s: {"head_dim": s["rope_dim"]},
    "mamba2": lambda s: {"head_dim": s["ssm_head_dim"], "num_heads": s["ssm_heads"]},
    "molmo2": lambda s: {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark_audio": lambda s: {
        "num_hidden_layers": 4,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
    },
    "nemotron_h_omni": lambda s: {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron3_diarization": lambda s: {"head_config": {"audio_hidden_size": s["hidden"]}},
    "nemotron_h": lambda s: {
        "layers_block_type": pattern(s, "linear_attention", "moe", "full_attention", "mlp")
    },
    "paddleocr_vl_text": lambda s: sections(s["head_dim"]),
    "perception_lm": lambda s: {"vision_config": CLIP | {"model_args": {"embed_dim": 32}}},
    "pix2struct_text_model": lambda s: {"d_kv": narrow(s)},
    "qwen2_5_omni_text": lambda s: sections(narrow(s)),
    "qwen2_5_vl_text": lambda s: sections(narrow(s)),
    "qwen2_vl_text": lambda s: sections(narrow(s)),
    "qwen4_exp_text": lambda s: {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": s["head_dim"] + 2,
        "eos_token_id": 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "hc_count": 2,
        "hc_lowrank": 8,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "reformer": lambda s: {
        "attn_layers": pattern(s, "local", "lsh"),
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,  # cached LSH attention fails from its chunk length (64) on
    },
    "rwkv": lambda s: {"attention_hidden_size": s["hidden"]},
    "stablelm": lambda s: {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},
    "vibevoice_acoustic_tokenizer_encoder": lambda s: {
        "num_filters": 4,
        "downsampling_ratios": [2, 2],
        "depths": [1, 1, 1],
    },
    "vision-encoder-decoder": lambda s: {
        "decoder": {"is_decoder": True, "add_cross_attention": True}
    },
    "xlnet": lambda s: {"d_head": narrow(s), "mem_len": 10},
    "xlstm": lambda s: {  # widths are rounded up to 64, but run only when they need no rounding
        "hidden_size": s["hidden"] // 32 * 128,
        "num_heads": 2 * s["kv_heads"],
    },
    "xmod": lambda s: {"default_language": "en_XX"},
    "zamba": lambda s: {
        "layers_block_type": pattern(s, "linear_attention", "hybrid"),
        "attention_hidden_size": 2 * s["hidden"],
        "attention_head_dim": 2 * narrow(s),
    },
    "zamba2": lambda s: {"layers_block_type": pattern(s, "linear_attention", "hybrid")},
    "zaya": lambda s: {"num_experts_per_tok": 1},
}


def model_types() -> list[tuple[str, str]]:
    """Every (mapping, model type) that transformers can generate text with."""
    return [
        (mapping, model_type)
        for mapping, (names, _) in MAPPINGS.items()
        for model_type in getattr(modeling_auto, names)
    ]


def shrunk(default, sizes, ids):
    """The fields of a config.json that make this configuration tiny; special ids from `ids`."""
    names = [field.name for field in dataclasses.fields(default)]
    latent = "kv_lora_rank" in names
    found = {"model_type": default.model_type} if default.model_type else {}
    for name in names:
        value = vars(default).get(name)  # unread: what differs by layer refuses to be
        if isinstance(value, PreTrainedConfig):
            found[name] = shrunk(value, sizes if name in TEXT_PARTS else sizes | TOWERS, ids)
        elif name.endswith(("_token_id", "_token_index")):
            if isinstance(value, int) and value >= 8:
                found[name] = next(ids)
        elif name in QUANTITY and not isinstance(value, list | tuple | dict):
            quantity = QUANTITY[name]
            if latent and quantity == "head_dim":
                continue
            found[name] = sizes["heads" if latent and quantity == "kv_heads" else quantity]
    particular = PARTICULAR.get(default.model_type)
    return merge(found, particular(sizes)) if particular else found


def merge(found, particular):
    """Fields laid over a configuration; sub-configurations keep theirs unless the type changes."""
    for name, value in particular.items():
        nested = isinstance(value, dict) and isinstance(found.get(name), dict)
        if nested and "model_type" not in value:
            merge(found[name], value)
        else:
            found[name] = value
    return found


def tiny(mapping, model_type, sizes):
    """A sparse config.json of this type in these sizes."""
    default = CONFIG_MAPPING[model_type]()
    ids = itertools.chain(range(40, 63), itertools.repeat(63))
    found = shrunk(default, sizes, ids) | {"model_type": model_type}
    if mapping == "causal" and hasattr(default, "is_decoder") and not default.is_encoder_decoder:
        found["is_decoder"] = True  # BERT and its kin cache only as decoders
    return found


FP32_ONLY = {"xlnet"}
"""Types whose attention fails in bf16: it mixes in positions that are always fp32."""

NOT_BUILDABLE: dict[tuple[str, str], str] = {
    ("causal", model_type): "A draft model that reads its target's KV and keeps none of its own."
    for model_type in ("gemma4_assistant", "gemma4_unified_assistant")
}

# Variations that a type has besides the sizes; by the model_type of the decoder's configuration.
VARIATIONS: dict[str, list[tuple[str, Any]]] = {
    "cpmant": [("short prompt", {"prompt_length": 5})],
    "falcon": [
        ("multi-head", {"multi_query": False, "num_kv_heads": 4}),
        ("new decoder", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ],
    "gemma4_text": [
        ("keys as values", {"attention_k_eq_v": True, "num_global_key_value_heads": 1})
    ],
    "gemma4_unified_text": [
        ("keys as values", {"attention_k_eq_v": True, "num_global_key_value_heads": 1})
    ],
    "glm_moe_dsa": [("shared indexer", {"indexer_types": ["full", "shared"] * 2})],
    "gpt_bigcode": [("multi-head", {"multi_query": False})],
    "gpt_neo": [("a short window", {"window_size": 4})],
    "hrm_text": [("other cycles", {"H_cycles": 1, "L_cycles": 3})],
    "laguna": [
        (
            "windows",
            {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "num_attention_heads_per_layer": [4, 8, 4, 8],
            },
        )
    ],
    "mamba": [("other expansion", {"expand": 3})],
    "mamba2": [("other expansion", {"expand": 3, "num_heads": 6})],
    "minimax_m3_vl_text": [
        (
            "sparse",
            {
                "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
                "index_n_heads": 2,
                "index_block_size": 4,
                "index_topk_blocks": 2,
            },
        )
    ],
    "mistral_large4_text": [
        (
            "shared KV",
            {
                "kv_source_layers": [0, 0, 0, 3],
                "indexer_types": ["full", "shared", "full", "full"],
            },
        )
    ],
    "mllama_text_model": [(VISION, {})],
    "nemotron_h": [("other order", {"layers_block_type": ["mlp", "attention", "mamba"]})],
    "qwen4_exp_text": [("no embedding by layer", {"ple_layer_ids": []})],
    "reformer": [("local", {"attn_layers": ["local"] * 3})],
    "step3p5": [
        (
            "windows",
            {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "num_sliding_attention_heads": 8,
            },
        )
    ],
    "zaya": [
        ("windows", {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW})
    ],
}


def text_path(config):
    """The names that lead from a configuration to its decoder's."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return ()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            if value is text:
                return (name,)
            if value.get_text_config(decoder=True) is text:
                return (name, *text_path(value))
    return ()


def variations(mapping, text):
    """What can be told apart in a decoder besides its sizes."""
    names = {field.name for field in dataclasses.fields(text)}
    found = list(VARIATIONS.get(text.model_type, []))
    optional = {f.name for f in dataclasses.fields(text) if "None" in str(f.type)}
    if "sliding_window" in optional and "layer_types" not in names:
        found.append(("window off", {"sliding_window": None}))
    kinds = set(getattr(text, "layer_types", None) or [])
    mixed = {"full_attention", "sliding_attention"}
    if "sliding_window" in names and "layer_types" in names and kinds and kinds <= mixed:
        layer_types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
        switch = {"use_sliding_window": True} if "use_sliding_window" in names else {}
        found.append(("listed layers", {"layer_types": layer_types} | switch))
    # Caches are as deep as the encoder in T5 and its kin, and in decoders used alone: a shallow
    # decoder leaves layers empty there, and a deep one fails.
    for depth in {"decoder_layers", "num_decoder_layers"} & names:
        found.append(("shallow decoder", {depth: 2}))
        if depth == "decoder_layers" and mapping != "causal":
            found.append(("deep decoder", {depth: 6}))
    if "use_sliding_window" in names:
        found.append(("window on", {"use_sliding_window": True, "max_window_layers": 1}))
    return found


def cases(mapping, model_type):
    """The tiny models of one type."""
    default = CONFIG_MAPPING[model_type]()
    path = text_path(default)
    text = default.get_text_config(decoder=True)
    encoded = (default.is_encoder_decoder and mapping != "causal") or model_type == "blip"
    found = [(variation, tiny(mapping, model_type, sizes)) for variation, sizes in SIZES.items()]
    for variation, overrides in variations(mapping, text):
        config = copy.deepcopy(found[0][1])
        part = config
        for name in path:
            part = part[name]
        part.update(copy.deepcopy(overrides))
        found.append((variation, config))
    return [
        Case(
            mapping,
            model_type,
            variation,
            config,
            ENCODER_TOKENS if encoded or variation == VISION else 0,
        )
        for variation, config in found
    ]


@contextlib.contextmanager
def without_towers(model_type):
    """Gemma 3n's image encoder comes from timm: an empty module stands in for it."""
    if model_type != "gemma3n":
        yield
        return
    auto = transformers.AutoModel
    with mock.patch.object(auto, "from_config", wraps=auto.from_config) as made:
        made.side_effect = lambda config: (
            torch.nn.Identity() if "vision" in config.model_type else mock.DEFAULT
        )
        yield


def build(case, dtype=torch.float32):
    """The model with random weights, on the CPU, of the class that its mapping names."""
    torch.manual_seed(0)
    names, auto = MAPPINGS[case.mapping]
    config = CONFIG_MAPPING[case.model_type].from_dict(copy.deepcopy(case.config))
    if case.model_type not in UNRESOLVED:
        with without_towers(case.model_type):
            model = getattr(transformers, auto).from_config(config, dtype=dtype)
        return as_loaded(model, dtype).eval()
    model_class = getattr(transformers, getattr(modeling_auto, names)[case.model_type])
    model = model_class._from_config(config.get_text_config(decoder=True), dtype=dtype)
    return as_loaded(model, dtype).eval()


def as_loaded(model, dtype):
    """Loading a checkpoint keeps some parts in fp32, which building from a config does not."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        kept = build_glob_alternation(list(plan))[0]
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if kept.search(name):
                tensor.data = tensor.data.to(torch.float32)
    return model


UNRESOLVED = {"evolla", "musicgen", "musicgen_melody"}
"""Types that the auto classes of their mapping cannot build: their decoder alone."""

PARTS = {
    "blip": "text_decoder",
    "blip-2": "language_model",
    "diffusion_gemma": "model.encoder",
    "instructblip": "language_model",
    "instructblipvideo": "language_model",
    "kosmos-2": "text_model",
    "pi0": "model.vlm",
}
"""Where a whole model insists on an image (or a robot's state): the part whose cache it keeps."""

STATES = {
    "blip": "encoder_hidden_states",
    "pix2struct": "encoder_outputs",
    "pp_formulanet": "encoder_outputs",
    "vision-encoder-decoder": "encoder_outputs",
    "mllama": "cross_attention_states",
}
"""What the states of an image encoder, here random, are passed as."""

CACHE_ARGUMENTS = {
    "reformer": "past_buckets_states",
    "rwkv": "state",
    "xlm": "cache",
    "xlnet": "mems",
    "xlstm": "cache_params",
}

WHOLE_INPUT = {"cpmant", "xlm"}
"""Types that are given all tokens at every step and skip those they have cached.

`generate` never hands xlm its cache, so that only a caller's own loop caches anything."""


def make_cache(model, case, name, batch):
    """The cache that `generate` makes; None where the model makes its own."""
    if case.model_type == "blt":  # fails in `generate`, whose cache looks for num_hidden_layers
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if not hasattr(model, "_prepare_cache_for_generation"):
        return None
    made = {}
    model._prepare_cache_for_generation(model.generation_config, made, None, batch, 64)
    return made.get(name, made.get("past_key_values"))


def constants(model, case, batch):
    """What a model is given at every step besides tokens: encoded states, mostly."""
    if not case.encoder_tokens:
        return {"use_mems": True} if case.model_type == "xlnet" else {}
    name = STATES.get(case.model_type, "encoder_outputs")
    text = model.config.get_text_config(decoder=True)
    if case.model_type not in STATES:
        inputs = {"input_ids": torch.randint(10, 40, (batch, case.encoder_tokens))}
        if case.model_type == "udop":
            inputs["bbox"] = torch.zeros(batch, case.encoder_tokens, 4)
        return {name: model.get_encoder()(**inputs)}
    width = getattr(text, "encoder_hidden_size", text.hidden_size)
    states = torch.randn(batch, case.encoder_tokens, width, dtype=model.dtype)
    if name == "encoder_outputs":
        states = BaseModelOutput(last_hidden_state=states)
    return {name: states}


def arguments(model, case, new, batch):
    """What a model is given at one step of `new` tokens besides them."""
    if case.model_type == "voxtral_realtime":  # hears as long as it reads
        length = new * model.config.downsample_factor
        width = model.config.audio_config.hidden_size
        return {"encoder_inputs_embeds": torch.randn(batch, length, width, dtype=model.dtype)}
    if case.model_type == "idefics":  # looks at an image, whose keys it does not cache
        width = model.config.vision_config.embed_dim
        return {
            "image_encoder_embeddings": torch.randn(batch, 1, 5, width, dtype=model.dtype),
            "image_attention_mask": torch.ones(batch, new, 1),
        }
    return {}


def run(model, case, *, prompt, decode, batch):
    """Feed a prompt, then single tokens; what the cache holds after each of the two phases."""
    part = model
    for name in PARTS.get(case.model_type, "").split("."):
        part = getattr(part, name) if name else part
    rows = (
        batch * getattr(part.config, "num_codebooks", 1) if "musicgen" in case.model_type else batch
    )
    tokens = torch.randint(10, 40, (rows, prompt + decode))
    tokens_name = "decoder_input_ids" if part.config.is_encoder_decoder else "input_ids"
    cache_name = CACHE_ARGUMENTS.get(
        case.model_type,
        "cache_params" if "mamba" in type(part).__name__.lower() else "past_key_values",
    )
    after_prefill = []
    with torch.inference_mode():
        cache = make_cache(part, case, cache_name, batch)
        fixed = constants(part, case, batch)
        for seen in (0, *range(prompt, prompt + decode)):
            until = max(seen + 1, prompt)
            step = tokens[:, 0 if case.model_type in WHOLE_INPUT else seen : until]
            output = part(
                **fixed,
                **arguments(part, case, until - seen, batch),
                **{tokens_name: step, cache_name: cache},
                use_cache=True,
            )
            cache = getattr(output, cache_name, cache)
            after_prefill = after_prefill or held(part, case, cache)
            fixed.pop("cross_attention_states", None)  # mllama sees its image in the prompt
    layers = held(part, case, cache)
    return Held(layers, sum(layers), after_prefill)


def states_by_layer(model, case, cache):
    """What a cache keeps for each decoder layer."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        # blt keeps the layers of its byte encoder in one and of its byte decoder in the other
        return (
            [*own, *cross] if case.model_type == "blt" else list(itertools.zip_longest(own, cross))
        )
    if case.model_type == "recurrent_gemma":  # recurrent layers keep their state in the module
        modules = [list(layer.modules()) for layer in model.model.layers]
        kept = [
            [v for m in part for v in vars(m).values() if isinstance(v, torch.Tensor)]
            for part in modules
        ]
        return list(itertools.zip_longest(cache.layers, kept))
    if case.model_type == "xlstm":
        return list(cache.rnn_state.values())
    if case.model_type == "reformer":
        return list(itertools.zip_longest(cache.states_cache, cache.buckets_cache))
    if case.model_type == "minimax":
        return list(itertools.zip_longest(cache.layers, cache.linear_cache))
    return cache if isinstance(cache, list | tuple) else cache.layers


def held(model, case, cache):
    """Bytes of unique storages by layer; a storage shared by layers counts in the first."""
    if case.model_type == "openai-gpt":  # has no cache: every step reads every token again
        return [0] * model.config.n_layer
    if case.model_type == "rwkv":  # every state is stacked over the layers
        layers = model.config.num_hidden_layers
        return [sum(storage.nbytes() for storage in storages(cache)) // layers] * layers
    seen = set()
    layers = []
    for states in states_by_layer(model, case, cache):
        found = {storage.data_ptr(): storage.nbytes() for storage in storages(states)}
        layers.append(sum(size for pointer, size in found.items() if pointer not in seen))
        seen |= found.keys()
    return layers


def storages(state):
    """The storages of every tensor in an object; attributes with an underscore are settings."""
    if isinstance(state, torch.Tensor):
        if state.untyped_storage().nbytes():
            yield state.untyped_storage()
    elif isinstance(state, dict):
        for value in state.values():
            yield from storages(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from storages(value)
    elif hasattr(state, "__dict__"):
        yield from storages({k: v for k, v in vars(state).items() if not k.startswith("_")})
