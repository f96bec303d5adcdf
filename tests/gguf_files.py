"""GGUF files for tests: the metadata of one small model of each architecture, and how to write it.

`tests/llama_cpp_oracle.py` loads these in llama.cpp. All integers are u32, as converters write
them, unless a value says otherwise (`Typed`).
"""

import struct
from typing import NamedTuple


class Typed(NamedTuple):
    """A value of a type of the format's own: `b"Q"` for u64, as `struct` writes it."""

    kind: int
    packed: bytes


def string(text):
    """A string as the format has it."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item):
    """Type and bytes of a value."""
    if isinstance(item, Typed):
        return item
    if isinstance(item, bool):
        return Typed(7, struct.pack("<?", item))
    if isinstance(item, int):
        return Typed(4, struct.pack("<I", item))
    if isinstance(item, float):
        return Typed(6, struct.pack("<f", item))
    if isinstance(item, str | bytes):
        return Typed(8, string(item))
    typed = [value(one) for one in item]
    kind = typed[0].kind if typed else 4
    body = b"".join(one.packed for one in typed)
    return Typed(9, struct.pack("<IQ", kind, len(typed)) + body)


def encode(pairs, *, version=3, tensors=0, count=None):
    """The header of a file with these pairs; `count` says another number of them than there are."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs) if count is None else count)
    body = b""
    for key, item in pairs.items():
        kind, packed = value(item)
        body += string(key) + struct.pack("<I", kind) + packed
    return head + body


def pairs_of(architecture, keys):
    """All keys, with the architecture's name in front."""
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": item for key, item in keys.items()},
    }


LAYERS = 6
BASE = {
    "block_count": LAYERS,
    "context_length": 4096,
    "embedding_length": 256,
    "feed_forward_length": 64,
    "attention.head_count": 8,
    "attention.head_count_kv": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
}
EXPERTS = {
    "expert_count": 2,
    "expert_used_count": 1,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 2,
    "leading_dense_block_count": LAYERS,
}
SSM = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 512,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}
WINDOW = {"attention.sliding_window": 128}
LATENTS = EXPERTS | {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 32,
}
OLD_LATENTS = {
    key: item
    for key, item in LATENTS.items()
    if not key.endswith("_mla") and key != "attention.head_count_kv"
} | {"attention.key_length": 64, "attention.value_length": 32, "attention.head_count_kv": 8}
DELTA = SSM | {"ssm.inner_size": 128, "ssm.time_step_rank": 4, "ssm.state_size": 32}
SOME_ATTEND = {"attention.head_count_kv": [0, 0, 4, 0, 0, 4]}

FILES = {
    "llama": ("llama", BASE | {"rope.dimension_count": 32}),
    "llama, MQA": ("llama", BASE | {"attention.head_count_kv": 1}),
    "mistral": ("llama", BASE | WINDOW),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", BASE | {"attention.key_length": 64, "attention.value_length": 64}),
    "qwen3moe": ("qwen3moe", BASE | EXPERTS | {"leading_dense_block_count": 0}),
    "gemma": ("gemma", BASE | {"attention.key_length": 64, "attention.value_length": 64}),
    "gemma2": ("gemma2", BASE | WINDOW),
    "gemma2 without its window": ("gemma2", BASE),
    "gemma3": ("gemma3", BASE | WINDOW),
    "gemma3 by a list": (
        "gemma3",
        BASE | WINDOW | {"attention.sliding_window_pattern": [True, True, False] * 2},
    ),
    "gemma3 without its window": ("gemma3", BASE),
    "gemma3n": (
        "gemma3n",
        BASE
        | WINDOW
        | {
            "block_count": 25,
            "embedding_length_per_layer_input": 16,
            "altup.num_inputs": 4,
            "altup.active_idx": 0,
            "feed_forward_length": 64,
        },
    ),
    "gemma4": (
        "gemma4",
        BASE
        | WINDOW
        | {
            "attention.sliding_window_pattern": [True, True, False] * 2,
            "attention.head_count_kv": [4, 4, 2] * 2,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "attention.shared_kv_layers": 3,
            "embedding_length_per_layer_input": 0,
            "rope.dimension_count": 64,
            "rope.dimension_count_swa": 32,
        },
    ),
    "gpt-oss": ("gpt-oss", BASE | WINDOW | EXPERTS),
    "cohere2": ("cohere2", BASE | WINDOW | {"logit_scale": 1.0}),
    "olmo2": ("olmo2", BASE | {"attention.head_count_kv": 8}),
    "olmo3": ("olmo2", BASE | WINDOW | {"attention.head_count_kv": 8}),
    "exaone4": ("exaone4", BASE | WINDOW),
    "exaone4 of 64 layers": ("exaone4", BASE | WINDOW | {"block_count": 64}),
    "laguna": ("laguna", BASE | WINDOW | EXPERTS),
    "mellum": ("mellum", BASE | WINDOW | EXPERTS),
    "llama4": ("llama4", BASE | EXPERTS | {"interleave_moe_layer_step": 0}),
    "phi3": ("phi3", BASE | WINDOW | {"rope.dimension_count": 32}),
    "glm4moe with MTP": ("glm4moe", BASE | EXPERTS | {"nextn_predict_layers": 1}),
    "deepseek2": ("deepseek2", BASE | LATENTS),
    "deepseek2 of 2024": ("deepseek2", BASE | OLD_LATENTS),
    "deepseek32": (
        "deepseek32",
        BASE
        | LATENTS
        | {
            "attention.indexer.head_count": 4,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 16,
        },
    ),
    "mamba": (
        "mamba",
        BASE | SSM | {"attention.head_count": 0, "attention.head_count_kv": 0},
    ),
    "mamba2": (
        "mamba2",
        BASE | SSM | {"attention.head_count": 0, "attention.head_count_kv": 0},
    ),
    "falcon-h1": ("falcon-h1", BASE | SSM),
    "granitehybrid": ("granitehybrid", BASE | SSM | SOME_ATTEND),
    "jamba": ("jamba", BASE | SSM | SOME_ATTEND),
    "nemotron_h": (
        "nemotron_h",
        BASE | SSM | SOME_ATTEND | {"feed_forward_length": [64, 0, 0, 64, 0, 0]},
    ),
    "lfm2": ("lfm2", BASE | SOME_ATTEND | {"shortconv.l_cache": 3}),
    "lfm2moe": ("lfm2moe", BASE | EXPERTS | SOME_ATTEND | {"shortconv.l_cache": 3}),
    "qwen3next": ("qwen3next", BASE | EXPERTS | DELTA),
    "qwen35": ("qwen35", BASE | DELTA | {"rope.dimension_sections": [4, 4, 4, 4]}),
    "qwen35moe": (
        "qwen35moe",
        BASE
        | EXPERTS
        | DELTA
        | {"rope.dimension_sections": [4, 4, 4, 4], "full_attention_interval": 3},
    ),
}
"""Architecture and keys of each file."""
