"""SGLang: sizes that servers printed, and what holds for every model and option."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalc.api import read_model, size
from kvcalc.dtypes import FORMATS, storage_format
from kvcalc.engines import Plan, read_options, sglang
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.layers import HeadsLayer

GIB = 1024**3

QWEN_30B = "Qwen/Qwen3-30B-A3B-Base"
QWEN_235B = "Qwen/Qwen3-235B-A22B"

PRINTED = {
    "sglang-004": ("moonshotai/Kimi-K2.5", 8, "bf16", {"max_total_tokens": 2454421}, "KV 160.63"),
    "sglang-008": (
        "meta-llama/Llama-3.1-8B-Instruct",
        1,
        "auto",
        {"max_total_tokens": 20480},
        "K 1.25, V 1.25",
    ),
    "sglang-010": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        1,
        "auto",
        {"max_total_tokens": 2658165},
        "K 15.21, V 15.21",
    ),
    "sglang-014": (
        "Qwen/Qwen3.5-35B-A3B",
        1,
        "auto",
        {"max_mamba_cache_size": 32, "mamba_ssm_dtype": "float32", "max_total_tokens": 4096},
        "K 0.04, ssm 1.93, conv 0.05",
    ),
    "sglang-027": (QWEN_30B, 1, "auto", {"max_total_tokens": 549277}, "K 25.14"),
    "sglang-030": (QWEN_235B, 4, "auto", {"max_total_tokens": 367404}, "K 8.23, V 8.23"),
    "sglang-035": (
        "Qwen/Qwen2.5-1.5B-Instruct",
        1,
        "nvfp4",
        {"max_total_tokens": 5519481, "page_size": 1},
        "K 20.73, V 20.73",
    ),
    "sglang-039": (
        "google/gemma-4-26B-A4B-it",
        2,
        "bf16",
        {"max_total_tokens": 815815, "swa_full_tokens_ratio": 0.03, "page_size": 1},
        "window K 1.17, K 3.89, all 10.11",
    ),
    "sglang-040": (
        "google/gemma-4-26B-A4B-it",
        2,
        "bf16",
        {"max_total_tokens": 117840, "swa_full_tokens_ratio": 0.8, "page_size": 1},
        "window K 4.50, K 0.56, all 10.11",
    ),
    "sglang-042": (
        "google/gemma-4-31B-it",
        2,
        "fp8",
        {"max_total_tokens": 347053, "swa_full_tokens_ratio": 0.05, "page_size": 1},
        "window K 1.65, K 3.31, all 9.93",
    ),
}
"""Record: model (or one with the same layers), tp, KV dtype, options, and what one rank printed."""


def rank_sizes(model, tp, kv_dtype, options, *, tokens=1, batch=1):
    """Bytes of one rank by what a server calls them."""
    architecture, *_ = read_model(model)
    name = sglang.auto_dtype(architecture).value if kv_dtype == "auto" else kv_dtype
    dtype = storage_format(name)
    sglang.check_dtype(dtype)
    plan = Plan(tokens, batch, dtype, tp, 1, read_options("sglang", sglang.OPTIONS, options))
    sizes = dict.fromkeys(("K", "V", "window K", "window V", "KV", "ssm", "conv"), 0)
    for layer in sglang.lay_out(architecture, plan):
        for part in layer.shard(tp).parts():
            num_bytes = part.num_bytes(tokens=tokens, batch=batch, dtype=dtype)
            if isinstance(part, sglang.StateSlots):
                recurrent = part.layer.states[-1]
                assert recurrent.dtype == "fp32"
                share = part.ssm.row_bytes(recurrent.shape[0] * recurrent.shape[1] ** 2)
                slots = num_bytes // part.slot_bytes()
                sizes["ssm"] += slots * share
                sizes["conv"] += num_bytes - slots * share
            elif isinstance(part.layer, HeadsLayer):
                _, key_dim, value_dim = part.layer.rows()
                prefix = "window " * part.windowed
                sizes[prefix + "K"] += num_bytes * key_dim // (key_dim + value_dim)
                sizes[prefix + "V"] += num_bytes * value_dim // (key_dim + value_dim)
            else:
                sizes["KV"] += num_bytes
    return sizes | {"all": sum(sizes.values())}


@pytest.mark.parametrize("record", PRINTED)
def test_prints_what_servers_printed(record):
    """Two decimals of GiB, the page of padding included."""
    model, tp, kv_dtype, options, printed = PRINTED[record]
    sizes = rank_sizes(model, tp, kv_dtype, options)
    for item in printed.split(", "):
        what, value = item.rsplit(" ", 1)
        assert f"{sizes[what] / GIB:.2f}" == value, what


def test_an_early_fp4_server_printed_the_values_without_their_scales():
    """sglang-034, a patched build: 8 of the 9 bytes that 16 values take."""
    options = {"max_total_tokens": 5539718, "page_size": 1}
    sizes = rank_sizes("Qwen/Qwen2.5-1.5B-Instruct", 1, "nvfp4", options)
    assert f"{sizes['K'] * 8 / 9 / GIB:.2f}" == "18.49"


MODELS = (
    "meta-llama/Meta-Llama-3-8B",
    "google/gemma-3-27b-it",
    "google/gemma-4-E4B-it",
    "openai/gpt-oss-20b",
    "XiaomiMiMo/MiMo-V2-Flash",
    "deepseek-ai/DeepSeek-V3.2",
    "Qwen/Qwen3.5-27B",
    "tiiuae/Falcon-H1-7B-Instruct",
)

models = st.sampled_from(MODELS)
lengths = st.integers(1, 300_000)
batches = st.integers(1, 9)
ratios = st.sampled_from([0.03, 0.1, 0.333, 0.8, 1.0])


@cache
def architecture_of(model):
    """Read once."""
    return read_model(model)[0]


@given(models, lengths, batches, ratios, st.sampled_from([1, 16, 64]), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_allocates_at_least_what_the_architecture_keeps(model, tokens, batch, ratio, page, tp):
    """Padding, unused layers and replication only add."""
    options = {"swa_full_tokens_ratio": ratio}
    if "DeepSeek" not in model:
        options["page_size"] = page
    point = {"seq": tokens, "batch": batch, "kv_dtype": "bf16", "tp": tp}
    exact = size(model, **point).total_bytes
    assert size(model, engine="sglang", options=options, **point).total_bytes >= exact


@given(models, lengths, st.integers(0, 5000), batches, ratios)
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_allocate_less(model, tokens, more, batch, ratio):
    """Pools grow with the tokens, in steps."""
    options = {"swa_full_tokens_ratio": ratio}
    point = {"batch": batch, "engine": "sglang", "options": options, "kv_dtype": "bf16"}
    assert (
        size(model, seq=tokens, **point).total_bytes
        <= size(model, seq=tokens + more, **point).total_bytes
    )


@given(models, lengths, st.sampled_from([2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_ranks_cover_the_total(model, tokens, tp):
    """All ranks keep at least what one would, and none more than that."""
    try:
        split = size(model, seq=tokens, tp=tp, engine="sglang", kv_dtype="bf16")
    except UnsupportedError:
        return
    alone = size(model, seq=tokens, engine="sglang", kv_dtype="bf16").total_bytes
    assert alone / tp <= split.bytes_per_rank <= alone


@given(models, st.integers(10**7, 10**11), ratios, st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_capacity_fills_a_budget_without_its_page_of_padding(model, budget, ratio, tp):
    """What is left would hold no further page (1 token of the full pool, 64 of sparse ones)."""
    given_ratio = {"swa_full_tokens_ratio": ratio}
    options = read_options("sglang", sglang.OPTIONS, given_ratio)
    setting = {"dtype": FORMATS["bf16"], "tp": tp, "options": options}
    each = sglang.slot_bytes(architecture_of(model), **setting)
    found = sglang.capacity(architecture_of(model), budget, **setting)
    if not found.full_tokens:
        return
    page = 64 if "DeepSeek" in model else 1
    used = found.full_tokens * each.full + found.window_tokens * each.window
    states = (found.state_slots + 1) * each.state if each.state else 0
    assert used + states <= budget
    assert budget - used - states < page * (each.full + (1 + ratio) * each.window) + each.state + 8


def test_capacity_gives_states_their_share():
    """0.9 / 1.9 of a budget, unless their number is given; the padding slot counts."""
    model = architecture_of("Qwen/Qwen3.5-27B")

    def found(**given_options):
        options = read_options("sglang", sglang.OPTIONS, given_options)
        return sglang.capacity(model, 20 * GIB, dtype=FORMATS["bf16"], tp=1, options=options)

    state = sglang.slot_bytes(
        model,
        dtype=FORMATS["bf16"],
        tp=1,
        options=read_options("sglang", sglang.OPTIONS, {}),
    ).state
    assert found().state_slots == int(20 * GIB * 0.9 / 1.9) // state - 1
    fixed = found(max_mamba_cache_size=32)
    assert fixed.state_slots == 32
    assert fixed.full_tokens == (20 * GIB - 33 * state) // 65_536
    alone = found(disable_radix_cache=True, max_running_requests=4)
    assert alone.state_slots == 4


def test_capacity_of_a_window_pool_sized_by_requests():
    """The window pool comes first, the rest is the full pool's."""
    options = read_options(
        "sglang",
        sglang.OPTIONS,
        {"disable_radix_cache": True, "max_running_requests": 8, "chunked_prefill_size": 8192},
    )
    found = sglang.capacity(
        architecture_of("openai/gpt-oss-20b"),
        GIB,
        dtype=FORMATS["bf16"],
        tp=1,
        options=options,
    )
    assert found.window_tokens == 8 * (127 + 128 + 1 + 1) + 2 * 8192 + 1
    assert found.full_tokens == (GIB - found.window_tokens * 24_576) // 24_576


def test_a_capped_window_pool_is_laid_out():
    """Without radix cache the window pool does not depend on the tokens."""
    options = {
        "disable_radix_cache": True,
        "max_running_requests": 8,
        "chunked_prefill_size": 8192,
    }
    sizes = rank_sizes("openai/gpt-oss-20b", 1, "bf16", options, tokens=32768)
    window = 8 * (127 + 128 + 1 + 1) + 2 * 8192 + 1
    assert sizes["window K"] == 12 * (window + 1) * 8 * 64 * 2
    assert sizes["K"] == 12 * 32769 * 8 * 64 * 2


def test_slots_for_states():
    """5 a request with two tracking buffers, 3 without them, 1 without radix cache; and one."""
    for model, options, slots in [
        ("Qwen/Qwen3.5-27B", {}, 2 * 5 + 1),
        ("Qwen/Qwen3.5-27B", {"enable_mamba_extra_buffer": False}, 2 * 3 + 1),
        ("Qwen/Qwen3.5-27B", {"disable_radix_cache": True}, 2 + 1),
        ("Qwen/Qwen3.5-27B", {"max_running_requests": 4}, 4 * 5 + 1),
        ("Qwen/Qwen3.5-27B", {"max_mamba_cache_size": 12}, 12 + 1),
    ]:
        sizes = rank_sizes(model, 1, "bf16", options, batch=2)
        assert sizes["ssm"] == slots * 48 * 48 * 128 * 128 * 4, options
    halved = rank_sizes("Qwen/Qwen3.5-27B", 1, "bf16", {"mamba_ssm_dtype": "bfloat16"}, batch=2)
    assert halved["ssm"] == 11 * 48 * 48 * 128 * 128 * 2


def test_a_window_pool_is_made_large_enough_to_start():
    """128 tokens of gpt-oss want a full pool of more than (127 + 1) / 0.8 tokens."""
    sizes = rank_sizes("openai/gpt-oss-20b", 1, "bf16", {}, tokens=100)
    row = 12 * 8 * 64 * 2
    assert sizes["window K"] == (129 + 1) * row
    assert sizes["K"] == (162 + 1) * row  # int(161 × 0.8) is 128


def test_layers_that_share_have_slots_of_their_own():
    """Of 42 layers of Gemma 4 E4B 18 keep nothing, and 7 of all see every token."""
    report = size("google/gemma-4-E4B-it", seq="32k", engine="sglang", kv_dtype="bf16")
    kinds = {group.kind: len(group.indices) for group in report.groups}
    assert kinds == {"window_slots": 35, "full_attention_slots": 7}


def test_sparse_attention_in_fp8():
    """656 bytes and 132, of 64-token pages; 576 under trtllm kernels."""
    for options, row in [({}, 656), ({"dsa_trtllm": True}, 576)]:
        sizes = rank_sizes("deepseek-ai/DeepSeek-V3.2", 8, "fp8", options, tokens=100)
        assert sizes["KV"] == 61 * (128 + 64) * (row + 132)


def test_auto_follows_modelopt_alone():
    """`kv_cache_quant_algo` is taken, a `kv_cache_scheme` may be another tool's."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 256,
        "torch_dtype": "bfloat16",
    }
    for declared, dtype in [("FP8", "fp8"), ("NVFP4", "bf16"), (None, "bf16")]:
        given_config = config | {"quantization_config": {"kv_cache_quant_algo": declared}}
        assert size(given_config, seq=10, engine="sglang").kv_dtype == dtype
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    with pytest.raises(ConfigError, match="give --kv-dtype"):
        size(config | {"quantization_config": scheme}, seq=10, engine="sglang")
    assert size("deepseek-ai/DeepSeek-V3.2", seq=10, engine="sglang").kv_dtype == "bf16"


@pytest.mark.parametrize(
    ("model", "point", "error", "told"),
    [
        ("google/flan-t5-base", {}, UnsupportedError, "--engine model"),
        ("deepseek-ai/DeepSeek-V4-Flash", {}, UnsupportedError, "--engine model"),
        ("ai21labs/Jamba-v0.1", {}, UnsupportedError, "--engine model"),
        (MODELS[0], {"kv_dtype": "q8_0"}, UnsupportedError, "llama.cpp"),
        ("openai/gpt-oss-20b", {"kv_dtype": "nvfp4"}, UnsupportedError, "fp8 or bf16"),
        ("deepseek-ai/DeepSeek-V3.2", {"kv_dtype": "nvfp4"}, UnsupportedError, "bf16 or fp8"),
        ("openai/gpt-oss-20b", {"pp": 2}, UnsupportedError, "--pp"),
        ("deepseek-ai/DeepSeek-V3.2", {"options": {"page_size": 1}}, InputError, "pages of 64"),
        (MODELS[0], {"options": {"page_size": 0}}, InputError, "at least 1"),
        (MODELS[0], {"options": {"max_total_tokens": 99}}, InputError, "does not hold"),
        (MODELS[0], {"batch": 4, "options": {"max_running_requests": 3}}, InputError, "not 4"),
        ("Qwen/Qwen3.5-27B", {"options": {"max_mamba_cache_size": 4}}, InputError, "not 1"),
        ("Qwen/Qwen3.5-27B", {"options": {"mamba_ssm_dtype": "fp8"}}, InputError, "recurrent"),
        ("openai/gpt-oss-20b", {"options": {"max_total_tokens": 150}}, InputError, "too small"),
        (
            "openai/gpt-oss-20b",
            {"options": {"swa_full_tokens_ratio": 0}},
            InputError,
            "more than 0",
        ),
        (
            "openai/gpt-oss-20b",
            {"options": {"disable_radix_cache": True, "max_running_requests": 2}},
            InputError,
            "chunked_prefill_size",
        ),
    ],
)
def test_refuses(model, point, error, told):
    """What SGLang does not run or is not known for, and what can be done instead."""
    with pytest.raises(error, match=told):
        size(model, seq=100, engine="sglang", **point)


def test_pools_of_unlike_layers_are_refused():
    """OpenELM has other heads in each layer."""
    config = {
        "model_type": "openelm",
        "num_transformer_layers": 2,
        "num_kv_heads": [2, 3],
        "head_dim": 64,
    }
    with pytest.raises(UnsupportedError, match="not alike"):
        size(config, seq=10, engine="sglang")
