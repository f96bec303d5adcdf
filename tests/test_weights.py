"""Weights: parameters equal transformers' own classes, bytes equal published files' sizes."""

import contextlib
import copy
import json
import math
import os
import struct
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalc.errors import ConfigError, InputError, KvcalcError, UnsupportedError
from kvcalc.families import decoder_level
from kvcalc.sources import catalogue, resolve
from kvcalc.weights import _formats, weights_of, weights_of_files
from kvcalc.weights._decoders import OWN, PLANS

NULLABLE = {"n_inner", "q_lora_rank", "head_dim", "num_key_value_heads"}
"""Fields whose null a configuration class takes; excerpts in the catalogue have others."""


def sized():
    """Every catalogued model whose parameters are known, with its decoder's level."""
    for entry in catalogue.entries():
        try:
            found = weights_of(entry.config, dtype="bf16")
        except KvcalcError:
            continue
        yield entry, decoder_level(entry.config), found


SIZED = list(sized())
BY_TYPE = defaultdict(list)
for _entry, _level, _weights in SIZED:
    BY_TYPE[_level.model_type].append((_entry, _level, _weights))


def counted(model_type, config, *, tied=None):
    """Parameters of transformers' own class for a decoder, built without memory."""
    import torch
    import transformers

    alike = {"kimi_k2": "deepseek_v3"}  # the class that its repository's code is a copy of
    fields = {
        key: copy.deepcopy(value)
        for key, value in config.items()
        if key not in ("model_type", "quantization_config", "auto_map")
        and (value is not None or key in NULLABLE)
    }
    if (
        config.get("hidden_size_per_layer_input", 0) is None
    ):  # published so, which the class refuses
        fields["hidden_size_per_layer_input"] = 0
    built = transformers.AutoConfig.for_model(alike.get(model_type, model_type), **fields)
    with torch.device("meta"):
        if model_type == "qwen2_5_omni_text":
            from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

            model = omni.Qwen2_5OmniThinkerTextModel(built)
        elif type(built) in transformers.AutoModelForCausalLM._model_mapping:
            model = transformers.AutoModelForCausalLM.from_config(built)
            return sum(parameter.numel() for parameter in model.parameters())
        else:
            model = transformers.AutoModel.from_config(built)
    own = sum(parameter.numel() for parameter in model.parameters())
    if tied is None:
        tied = getattr(built, "tie_word_embeddings", False)
    return own + (0 if tied else built.vocab_size * built.hidden_size)


@pytest.mark.parametrize("model_type", sorted(BY_TYPE))
def test_parameters_equal_transformers(model_type, request):
    """Catalogued models have exactly the parameters of the class that runs them."""
    distinct = {}
    for entry, level, found in BY_TYPE[model_type]:
        key = json.dumps(level.config, sort_keys=True)
        distinct.setdefault(key, (entry, level, found))
    chosen = list(distinct.values())
    for entry, level, found in chosen if request.config.getoption("--full") else chosen[:2]:
        tied = entry.config.get("tie_word_embeddings", level.config.get("tie_word_embeddings"))
        assert found.num_parameters == counted(model_type, level.config, tied=tied), entry.name


def test_most_of_the_catalogue_is_known():
    """Dense and mixed, latent and hybrid, tied and untied models of many types are counted."""
    assert len(SIZED) >= 220
    assert len(BY_TYPE) >= 50


LIKE = {
    "mamba": {"use_conv_bias": True},
    "falcon_mamba": {"use_conv_bias": True},
    "mamba2": {"use_conv_bias": True},
    "nemotron_h": {"use_conv_bias": True},
    "bamba": {"mamba_conv_bias": True, "mamba_proj_bias": False},
    "falcon_h1": {
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_rms_norm": True,
        "projectors_bias": False,
    },
    "granitemoehybrid": {"mamba_conv_bias": True, "mamba_proj_bias": False},
    "jamba": {"mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_dt_rank": 300},
    "glm4_moe_lite": {"first_k_dense_replace": 2},
    "opt": {"word_embed_proj_dim": 768, "do_layer_norm_before": True},
    "phimoe": {"lm_head_bias": True},
    "seed_oss": {"attention_out_bias": True},
    "stablelm": {"use_qkv_bias": True},
}
"""Fields that decide and that the catalogue does not keep."""

OTHERWISE = {
    "mamba2": {"use_conv_bias": False},
    "falcon_h1": {
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "mamba_rms_norm": False,
        "projectors_bias": True,
    },
    "stablelm": {"use_qkv_bias": False, "use_parallel_residual": True},
    "phimoe": {"lm_head_bias": False},
    "seed_oss": {"attention_out_bias": False},
}


@pytest.mark.parametrize(
    ("model_type", "added"), [*LIKE.items(), *OTHERWISE.items()], ids=lambda value: str(value)[:40]
)
def test_fields_that_the_catalogue_lacks_decide(model_type, added):
    """A model is refused without the field that decides, and exact with either value of it."""
    entry = next(
        entry
        for entry in catalogue.entries()
        if entry.config.get("model_type") == model_type
        and "E" not in str(entry.config.get("hybrid_override_pattern"))
        and "layers_block_type" not in entry.config
        and entry.name not in ("ibm-granite/granite-4-8b-dense-hybrid", "facebook/opt-1.3b")
    )
    fields = {key: value for key, value in entry.config.items() if value is not None}
    fields |= added | {"tie_word_embeddings": False}
    if model_type == "opt":
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    if model_type == "glm4_moe_lite":
        fields["mlp_layer_types"] = ["dense"] * 2 + ["sparse"] * (fields["num_hidden_layers"] - 2)
    config = saved(model_type, fields)
    assert weights_of(config, dtype="bf16").num_parameters == counted(model_type, config)
    for key in added:
        excerpt = {name: value for name, value in config.items() if name != key}
        if key not in ("use_parallel_residual", "first_k_dense_replace"):
            with pytest.raises(UnsupportedError, match=f"{key}, which this config does not say"):
                weights_of(excerpt, dtype="bf16")


def saved(model_type, config):
    """The config.json that transformers writes for these fields and its own defaults."""
    import transformers

    fields = {key: value for key, value in config.items() if key != "model_type"}
    whole = transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    return json.loads(json.dumps(fields | whole, default=str)) | {"model_type": model_type}


SMALL = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}

BUILT = [
    ("phi", {"intermediate_size": 512, "qk_layernorm": False}),
    ("starcoder2", {"intermediate_size": 512, "use_bias": True, "num_key_value_heads": 2}),
    (
        "glm",
        {
            "intermediate_size": 512,
            "attention_bias": True,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        },
    ),
    ("llama", {"intermediate_size": 512, "attention_bias": True, "mlp_bias": True}),
    ("ministral3", {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 64}),
    ("qwen3", {"intermediate_size": 512, "attention_bias": True, "tie_word_embeddings": True}),
    ("falcon", {"bias": True, "new_decoder_architecture": False, "multi_query": False}),
    ("falcon", {"parallel_attn": False, "multi_query": True, "alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("cohere", {"intermediate_size": 512, "use_qk_norm": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt2", {"n_inner": 700}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "n_routed_experts": 16}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "attention_bias": True}),
    ("llama4_text", {"moe_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "qkv_bias": False}),
    (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "use_conv_bias": True,
            "moe_latent_size": 64,
            "moe_shared_expert_intermediate_size": 96,
            "num_hidden_layers": 4,
        },
    ),
]
"""Types and variants of which the catalogue has no whole config."""


@pytest.mark.parametrize(("model_type", "fields"), BUILT)
def test_variants_equal_transformers(model_type, fields):
    """Fields that switch biases, norms and kinds of layers are read as the class reads them."""
    config = saved(model_type, {**SMALL, **fields})
    assert weights_of(config, dtype="bf16").num_parameters == counted(model_type, config)


FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qk_norm", "qk_norm")
MIXED = {
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
NEEDED = {
    "deepseek_v2": {"mlp_bias": False},
    "helium": {"head_dim": 32},
    "ministral": {"head_dim": 64},
    "phi": {"qk_layernorm": False},
    "phimoe": {"lm_head_bias": True},
    "seed_oss": {"attention_out_bias": False},
    "stablelm": {"use_qkv_bias": True},
}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("model_type", sorted(PLANS.keys() - {"glm4v_text", "kimi_k2"}))
def test_flags_equal_transformers(model_type, flag):
    """Each switch of biases and norms does what it does in the class, or nothing as there."""
    if model_type.startswith(("qwen2_", "qwen3_")) and model_type.endswith("_text"):
        pytest.skip("its class is built in another test")
    config = SMALL | MIXED | dict.fromkeys(FLAGS, flag) | NEEDED.get(model_type, {})
    if PLANS[model_type].latent:
        config |= {"num_key_value_heads": 8}
    if getattr(PLANS[model_type].experts, "layers", "") == "first_dense":
        config |= {"first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 2}
    config = saved(model_type, config)
    assert weights_of(config, dtype="bf16").num_parameters == counted(model_type, config)


def test_every_type_in_the_tables_is_compared():
    """No type is counted that no test here builds."""
    built = BY_TYPE.keys() | LIKE.keys() | {model_type for model_type, _ in BUILT}
    assert OWN.keys() - built <= {"gemma4_text"}


@pytest.mark.parametrize("experts", [True, False])
def test_gemma_4_equals_transformers(experts):
    """Gemma 4's global layers have wider heads whose K is V; experts stand beside its MLP."""
    config = dict(catalogue.find("google/gemma-4-26B-A4B").config["text_config"])
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    config |= {"enable_moe_block": experts, "layer_types": pattern * 5}
    if experts:
        config["top_k_experts"] = 8
    found = weights_of(config, dtype="bf16").num_parameters
    assert found == counted("gemma4_text", config)
    assert not experts or found == 25_233_141_760


PUBLISHED = {
    "meta-llama/Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "openai-community/gpt2": 124_439_808,
    "openai/gpt-oss-20b": 20_914_757_184,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352,
    "Qwen/Qwen3-30B-A3B-FP8": 30_532_122_624,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
}
"""What their model cards and the headers of their files say (DeepSeek's without its MTP module)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    """Counts are those that the Hub shows for the published files."""
    config, _ = resolve(name)
    found = weights_of(config, dtype="bf16")
    assert found.num_parameters == PUBLISHED[name]
    assert found.num_bytes == 2 * PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("openai/gpt-oss-20b", 13_761_264_768), ("openai/gpt-oss-120b", 65_248_815_744)],
)
def test_mxfp4_is_the_published_size(name, num_bytes):
    """gpt-oss takes what its index gives as total_size: four-bit experts, bf16 elsewhere."""
    found = weights_of(resolve(name)[0])
    assert (found.format, found.num_bytes) == ("mxfp4", num_bytes)


TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
ATTENTION = [(256, 256)] * 4
FEED_FORWARD = [(384, 256), (384, 256), (256, 384)]
KEPT = 2 * (2 * 100 * 256 + 5 * 256)
GROUP = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}, "targets": ["Linear"]}
FP4 = {"weights": {"type": "float", "num_bits": 4, "group_size": 16}, "targets": ["Linear"]}


@pytest.mark.parametrize(
    ("quantization", "name", "matrix_bytes"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 100]},
            "fp8",
            lambda rows, columns: rows * columns + 4 * -(-rows // 128) * -(-columns // 100),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
            "fp8",
            lambda rows, columns: rows * columns + 4 + 4,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": GROUP},
                "ignore": ["lm_head"],
            },
            "fp8",
            lambda rows, columns: rows * columns + 2 * rows,
        ),
        (
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 128,
                "version": "GEMM",
                "zero_point": True,
            },
            "awq-int4",
            lambda rows, columns: rows * columns // 2 + columns // 128 * (2 * rows + rows // 2),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1},
            "gptq-int4",
            lambda rows, columns: rows * columns // 2 + 2 * rows + rows // 2 + 4 * columns,
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "config_groups": {"group_0": FP4},
                "ignore": ["lm_head"],
            },
            "nvfp4",
            lambda rows, columns: rows * columns // 2 + rows * columns // 16 + 4 + 4,
        ),
    ],
)
def test_bytes_of_quantised_matrices(quantization, name, matrix_bytes):
    """Payload, scales and zero points of every linear module, two bytes for all else."""
    found = weights_of(TINY | {"quantization_config": quantization})
    expected = KEPT + 2 * sum(matrix_bytes(*shape) for shape in ATTENTION + FEED_FORWARD)
    assert (found.format, found.num_bytes) == (name, expected)
    assert found.num_parameters == weights_of(TINY).num_parameters


@pytest.mark.parametrize(
    ("left_out", "shapes"),
    [
        (["lm_head"], []),
        (["model.layers.0.self_attn"], ATTENTION),
        (["language_model.model.layers.0.self_attn*"], ATTENTION),
        (["model.layers.*.mlp*"], 2 * FEED_FORWARD),
        (["o_proj"], [(256, 256)] * 2),
        (["model.layers.1.mlp.gate_proj"], [(384, 256)]),
        (["gate", "layers.1.mlp.gate", "model.layers.11*"], []),
    ],
)
def test_modules_left_out_keep_two_bytes(left_out, shapes):
    """Names of modules, of what they are in, of a part of them, and patterns are left out."""
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    whole = weights_of(TINY | {"quantization_config": block}).num_bytes
    some = TINY | {"quantization_config": block | {"modules_to_not_convert": left_out}}
    scales = sum(4 * math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in shapes)
    saved = sum(rows * columns for rows, columns in shapes)
    assert weights_of(some).num_bytes == whole + saved - scales


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "mxfp4"},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "awq", "bits": 3, "group_size": 128},
        {"quant_method": "gptq", "bits": 4, "group_size": 100},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "compressed-tensors", "ignore": ["re:.*"]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {},
    ],
)
def test_formats_that_are_not_known_are_refused(quantization):
    """A format whose bytes the config leaves open is refused; its parameters are known."""
    config = TINY | {"quantization_config": quantization}
    with pytest.raises(UnsupportedError, match=r"deciding field: quantization_config\."):
        weights_of(config)
    assert weights_of(config, dtype="fp32").num_bytes == 4 * weights_of(TINY).num_parameters


def test_patterns_are_bounded(monkeypatch):
    """A config cannot make kvcalc compare patterns for minutes."""
    monkeypatch.setattr(_formats, "MAX_COMPARISONS", 10)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignore": ["a*"]}
    with pytest.raises(UnsupportedError, match="too many patterns"):
        weights_of(TINY | {"quantization_config": quantization})


def test_a_config_without_dtype_is_refused():
    """Bytes need a dtype: the config's, or the caller's."""
    config = {key: value for key, value in TINY.items() if key != "torch_dtype"}
    with pytest.raises(UnsupportedError, match="deciding field: dtype"):
        weights_of(config)
    with pytest.raises(InputError, match="no plain dtype"):
        weights_of(config, dtype="int4")


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "hidden_size"])
def test_excerpts_do_not_borrow_class_defaults(key):
    """A plain decoder's config that leaves a size to its class is an excerpt, and refused."""
    config = {name: value for name, value in TINY.items() if name != key}
    with pytest.raises(UnsupportedError, match=f"leaves out {key}"):
        weights_of(config)


def test_wrappers_may_leave_defaults_out():
    """A wrapper's decoder is written without its class's own values; an excerpt says that it is."""
    config = {"model_type": "llava", "text_config": TINY | {"intermediate_size": 11008}}
    whole = weights_of(config)
    del config["text_config"]["intermediate_size"]
    found = weights_of(config)
    assert found.num_parameters == whole.num_parameters
    assert "from class defaults: text_config.intermediate_size" in found.notes
    with pytest.raises(UnsupportedError, match=r"leaves out text_config\.intermediate_size"):
        weights_of(config, complete=False)


def test_an_excerpt_must_say_whether_the_head_is_tied():
    """What is said to be an excerpt is refused without the tying of the head."""
    config = {key: value for key, value in TINY.items() if key != "tie_word_embeddings"}
    assert weights_of(config).num_parameters == weights_of(TINY, complete=False).num_parameters
    with pytest.raises(UnsupportedError, match="leaves out tie_word_embeddings"):
        weights_of(config, complete=False)


def test_wrappers_tie_in_one_way():
    """A wrapper's head is tied as it or its text part says, and refused when they disagree."""
    text = {key: value for key, value in TINY.items() if key != "tie_word_embeddings"}
    wrapped = {"model_type": "llava", "text_config": text, "tie_word_embeddings": True}
    found = weights_of(wrapped)
    assert found.num_parameters == weights_of(TINY).num_parameters - 100 * 256
    assert "encoders of images or sound are not counted" in found.notes[0]
    wrapped["text_config"] = TINY
    with pytest.raises(UnsupportedError, match="deciding field: tie_word_embeddings"):
        weights_of(wrapped)


@pytest.mark.parametrize("model_type", sorted(BY_TYPE))
def test_malformed_fields_are_kvcalc_errors(model_type):
    """Whatever a field holds, the answer is a record or an error of ours."""
    config = dict(BY_TYPE[model_type][0][1].config) | {"model_type": model_type}
    for key in config:
        for value in (None, -1, 0, "x", [], {}, 2**70, 1.5, [None], True):
            try:
                weights_of(config | {key: value}, dtype="bf16")
            except KvcalcError:
                continue


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["llama", "qwen3", "mistral", "gemma2", "olmo2"]),
    st.integers(1, 200),
    st.integers(1, 64).map(lambda heads: 8 * heads),
)
def test_more_layers_have_more_parameters(model_type, layers, width):
    """Each layer adds the same number of parameters, which grows with the width."""
    sizes = {"vocab_size": 1000, "intermediate_size": 2 * width, "num_attention_heads": 8}

    def found(layers, width):
        shape = {"hidden_size": width, "num_hidden_layers": layers, "head_dim": width // 8}
        config = {"model_type": model_type, "num_key_value_heads": 8} | sizes | shape
        return weights_of(config, dtype="bf16").num_parameters

    one = found(layers + 1, width) - found(layers, width)
    assert 0 < one == found(layers + 2, width) - found(layers + 1, width)
    assert found(layers, width + 8) > found(layers, width)


def test_counting_loads_nothing_heavy():
    """Weights are counted by the standard library alone."""
    script = (
        "import sys\nfrom kvcalc.weights import weights_of\nfrom kvcalc.sources import resolve\n"
        "weights_of(resolve('meta-llama/Llama-3-8B')[0])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy", "safetensors"} & set(done.stdout.split())


BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "U8": 8, "I32": 32, "F8_E8M0": 8}


def header_of(shapes, offset=0):
    """A header's entries for names with dtypes and shapes, and the bytes that follow it."""
    entries = {}
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return entries, offset


def save(path, shapes, **changes):
    """A safetensors file of zeros, written as a hole."""
    entries, size = header_of(shapes)
    write(path, json.dumps({"__metadata__": {"format": "pt"}} | entries | changes).encode(), size)


def write(path, header, size):
    """A file with this header and so many bytes behind it."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def llama_tensors(dtype="BF16"):
    """The tensors of TINY as transformers names them."""
    pairs = [("q", 256, 256), ("k", 256, 256), ("v", 256, 256), ("o", 256, 256)]
    shapes = {"model.embed_tokens.weight": (100, 256), "lm_head.weight": (100, 256)}
    for layer in range(2):
        base = f"model.layers.{layer}."
        shapes |= {f"{base}self_attn.{name}_proj.weight": (out, size) for name, out, size in pairs}
        shapes |= {f"{base}mlp.{name}_proj.weight": (384, 256) for name in ("gate", "up")}
        shapes[f"{base}mlp.down_proj.weight"] = (256, 384)
        shapes |= {f"{base}{name}_layernorm.weight": (256,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (256,)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def test_files_agree_with_the_config(tmp_path):
    """A checkpoint's headers count what its config says, in one file or in shards."""
    expected = weights_of(TINY)
    save(tmp_path / "model.safetensors", llama_tensors())
    whole = weights_of_files(tmp_path)
    assert whole[:3] == (expected.num_parameters, expected.num_bytes, "bf16")
    shards = tmp_path / "shards"
    shards.mkdir()
    sharded(shards)
    assert weights_of_files(shards)[:3] == whole[:3]


def sharded(folder):
    """TINY in two files and an index, which is returned."""
    tensors = list(llama_tensors().items())
    placed = {}
    for number, part in enumerate((tensors[:5], tensors[5:])):
        name = f"model-{number}.safetensors"
        save(folder / name, dict(part))
        placed |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return placed


def test_a_saved_model_is_read(tmp_path):
    """What transformers saves is counted as transformers counts it."""
    import torch
    import transformers

    shape = {key: value for key, value in TINY.items() if not key.endswith(("_type", "_dtype"))}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    found = weights_of_files(str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert found.num_parameters == model.num_parameters()
    assert found.num_bytes == sum(value.nbytes for value in model.parameters())


@pytest.mark.parametrize(
    ("tensors", "num_parameters", "name"),
    [
        ({"w": ("F8_E4M3", (256, 128)), "w_scale_inv": ("F32", (2, 1))}, 32768, "fp8"),
        (
            {"e_blocks": ("U8", (4, 8, 2, 16)), "e_scales": ("U8", (4, 8, 2))},
            4 * 8 * 64,
            "mxfp4",
        ),
        (
            {
                "a.weight": ("U8", (64, 32)),
                "a.weight_scale": ("F8_E4M3", (64, 4)),
                "a.weight_scale_2": ("F32", ()),
                "a.input_scale": ("F32", ()),
            },
            64 * 64,
            "nvfp4",
        ),
        (
            {
                "a.qweight": ("I32", (256, 16)),
                "a.qzeros": ("I32", (2, 16)),
                "a.scales": ("F16", (2, 128)),
            },
            256 * 128,
            "awq-int4",
        ),
        (
            {
                "a.qweight": ("I32", (64, 128)),
                "a.qzeros": ("I32", (2, 32)),
                "a.scales": ("F16", (2, 128)),
                "a.g_idx": ("I32", (256,)),
            },
            256 * 128,
            "gptq-int8",
        ),
    ],
)
def test_packed_files(tmp_path, tensors, num_parameters, name):
    """Packed values count as what they unpack to, scales and zero points as none."""
    save(tmp_path / "model.safetensors", tensors)
    found = weights_of_files(tmp_path)
    assert (found.num_parameters, found.format) == (num_parameters, name)
    assert found.num_bytes == header_of(tensors)[1]


def test_unknown_packing_has_bytes_alone(tmp_path):
    """Integers that nothing explains have exact bytes; their tensor is named in a note."""
    save(tmp_path / "model.safetensors", {"a.weight_packed": ("I32", (4, 4))})
    found = weights_of_files(tmp_path)
    assert (found.num_parameters, found.num_bytes, found.format) == (0, 64, "packed")
    assert "'a.weight_packed' of I32" in found.notes[-1]


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"", 0),
        (b"[]", 0),
        (b"{", 0),
        (b"\xff\xfe", 0),
        (b"[" * 100_000, 0),
        (b'{"a": ' + b"9" * 5000 + b"}", 0),
        (b'{"a": 1}', 0),
        (b'{"a": {}}', 0),
        (json.dumps({"a": GOOD}).encode(), 15),
        (json.dumps({"a": GOOD}).encode(), 17),
        (json.dumps({"a": GOOD | {"dtype": "F7"}}).encode(), 16),
        (json.dumps({"a": GOOD | {"dtype": ["F32"]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [2, 3]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [-2, -2]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [True, 4]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [4.0]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [1] * 1000 + [4]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"shape": [2**50, 2**50]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"data_offsets": [16, 0]}}).encode(), 16),
        (json.dumps({"a": GOOD | {"data_offsets": [1, 17]}}).encode(), 17),
        (json.dumps({"a": GOOD | {"data_offsets": [0]}}).encode(), 16),
        (json.dumps({"a": GOOD, "b": GOOD}).encode(), 16),
        (b'{"a": %b, "a": %b}' % ((json.dumps(GOOD).encode(),) * 2), 16),
    ],
)
def test_hostile_headers_are_input_errors(tmp_path, header, size):
    """A header that contradicts its file or itself makes one line, whatever it holds."""
    path = tmp_path / "model.safetensors"
    write(path, header, size)
    with pytest.raises(InputError, match=r"model\.safetensors") as raised:
        weights_of_files(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}"])
def test_lying_lengths_are_input_errors(tmp_path, data):
    """A header's length is held against the file before anything is read."""
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError):
        weights_of_files(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes_are_input_errors_or_answers(tmp_path_factory, data):
    """No change of bytes in a header makes anything but an answer or an error of ours."""
    folder = tmp_path_factory.mktemp("flipped")
    path = folder / "model.safetensors"
    save(path, {"a": ("F32", (2, 2)), "b": ("BF16", (3,))})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(InputError, UnsupportedError):
        assert weights_of_files(folder).num_bytes <= len(content)


@pytest.mark.parametrize(
    "change",
    [
        {"model.norm.weight": "../model-1.safetensors"},
        {"model.norm.weight": "/etc/passwd"},
        {"model.norm.weight": "missing.safetensors"},
        {"model.norm.weight": "model-0.safetensors"},
        {"model.norm.weight": 7},
        {"model.norm.weight": None},
        {"more": "model-1.safetensors"},
    ],
)
def test_indices_that_lie_are_input_errors(tmp_path, change):
    """An index leads to files beside it alone, and to the tensors that they have."""
    placed = sharded(tmp_path) | change
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(InputError):
        weights_of_files(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_indices_are_input_errors(tmp_path, content):
    """An index without a map is an error, though there may be a file beside it."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="index"):
        weights_of_files(tmp_path)


def test_missing_files_are_input_errors(tmp_path):
    """A folder without weights, a folder that is none, and a pipe are errors, not waits."""
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        weights_of_files(tmp_path)
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        weights_of_files(tmp_path / "none")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError):
        weights_of_files(tmp_path)


def test_unknown_types_are_refused():
    """A type whose weights nobody compared is refused by its name."""
    with pytest.raises(UnsupportedError, match="deciding field: model_type"):
        weights_of(resolve("google-t5/t5-small")[0])
    with pytest.raises(ConfigError):
        weights_of({})
