"""TensorRT-LLM: sizes that servers printed, and what holds for every model and option."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalc.api import read_model, size
from kvcalc.dtypes import FORMATS, storage_format
from kvcalc.engines import Plan, read_options, tensorrt_llm
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.sources import catalogue

GIB = 1024**3


def config_of(model, **changes):
    """A catalogue entry's config, changed."""
    return dict(catalogue.find(model).config) | changes


def first_layers_of_mimo():
    """The record's model: a full layer and one with a window."""
    config = config_of("XiaomiMiMo/MiMo-V2-Flash")
    return config | {
        "num_hidden_layers": 2,
        "hybrid_layer_pattern": config["hybrid_layer_pattern"][:2],
    }


def modelopt_fp8():
    """Qwen3-8B as ModelOpt exports it."""
    return config_of("Qwen/Qwen3-8B", quantization_config={"kv_cache_quant_algo": "FP8"})


QWEN_8B = "Qwen/Qwen3-8B"

PRINTED = {
    "tensorrt-llm-006": (
        "openai-community/gpt2-medium",
        1,
        "fp16",
        {"tokens_per_block": 128, "max_tokens": 219776},
        21604859904,
    ),
    "tensorrt-llm-011": ("nvidia/Kimi-K2.5-NVFP4", 8, "auto", {"max_tokens": 5073376}, "166.02"),
    "tensorrt-llm-014": (QWEN_8B, 1, "fp8", {"max_tokens": 33984}, "2.33"),
    "tensorrt-llm-015": (modelopt_fp8, 1, "auto", {"max_tokens": 8224}, "0.56"),
    "tensorrt-llm-016": (modelopt_fp8, 1, "auto", {"max_tokens": 46208}, "3.17"),
    "tensorrt-llm-017": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        1,
        "auto",
        {"max_tokens": 422048},
        "9.06",
    ),
    "tensorrt-llm-019": (first_layers_of_mimo, 1, "bf16", {"max_tokens": 262112}, "2.25"),
}
"""Record: model (or what makes it), tp, KV dtype, options, and what one rank printed."""


@pytest.mark.parametrize("record", PRINTED)
def test_prints_what_servers_printed(record):
    """Bytes, or two decimals of GiB."""
    model, tp, kv_dtype, options, printed = PRINTED[record]
    report = size(
        model if isinstance(model, str) else model(),
        seq=1,
        tp=tp,
        kv_dtype=kv_dtype,
        engine="tensorrt-llm",
        options=options,
    )
    found = report.bytes_per_rank
    assert printed in (found, f"{found / GIB:.2f}")


MODELS = (
    "meta-llama/Meta-Llama-3-8B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "XiaomiMiMo/MiMo-V2-Flash",
    "deepseek-ai/DeepSeek-V3.2",
    "moonshotai/Kimi-K2.5",
)

models = st.sampled_from(MODELS)
lengths = st.integers(1, 300_000)
batches = st.integers(1, 9)
block_sizes = st.sampled_from([None, 2, 32, 128])


def options_for(model, tokens_per_block):
    """Index keys have blocks of one size."""
    return {} if "DeepSeek" in model else {"tokens_per_block": tokens_per_block}


@given(models, lengths, batches, block_sizes, st.sampled_from(["bf16", "fp8"]))
@settings(max_examples=60, deadline=None)
def test_allocates_at_least_what_the_architecture_keeps(model, tokens, batch, block, kv_dtype):
    """Blocks, padded V and whole windows only add."""
    point = {"seq": tokens, "batch": batch, "kv_dtype": kv_dtype}
    allocated = size(model, engine="tensorrt-llm", options=options_for(model, block), **point)
    assert allocated.total_bytes >= size(model, **point).total_bytes


@given(models, lengths, st.integers(0, 5000), batches, block_sizes)
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_allocate_less(model, tokens, more, batch, block):
    """Pools grow with the tokens, in blocks."""
    point = {"batch": batch, "engine": "tensorrt-llm", "options": options_for(model, block)}
    few, many = size(model, seq=tokens, **point), size(model, seq=tokens + more, **point)
    assert few.total_bytes <= many.total_bytes


@given(models, lengths, st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=40, deadline=None)
def test_ranks_cover_the_total(model, tokens, tp):
    """All ranks keep at least what one would, and none more than that."""
    try:
        split = size(model, seq=tokens, tp=tp, engine="tensorrt-llm")
    except UnsupportedError:
        return
    alone = size(model, seq=tokens, engine="tensorrt-llm").total_bytes
    assert alone / tp <= split.bytes_per_rank <= alone


@given(
    models.filter(lambda model: "SmolLM2" not in model),  # 3 KV heads
    st.integers(0, 10**11),
    st.sampled_from([1, 4]),
    st.sampled_from(["bf16", "fp8"]),
)
@settings(max_examples=60, deadline=None)
def test_capacity_rounds_tokens_up_to_blocks(model, budget, tp, kv_dtype):
    """The last block may be beyond the budget, the one before it is not."""
    architecture, *_ = read_model(model)
    options = read_options("tensorrt-llm", tensorrt_llm.OPTIONS, {})
    setting = {"dtype": storage_format(kv_dtype), "tp": tp, "options": options}
    each = tensorrt_llm.token_bytes(architecture, **setting)
    found = tensorrt_llm.capacity(architecture, budget, **setting)
    per_block = 64 if "DeepSeek" in model else 32
    assert found.tokens == found.blocks * per_block
    assert max(found.blocks - 1, 0) * per_block * each <= budget
    assert budget < (found.tokens + 1) * each


def test_capacity_is_what_a_server_printed():
    """tensorrt-llm-017's tokens come back from its bytes, and the smaller of two limits wins."""
    architecture, *_ = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    setting = {"dtype": FORMATS["bf16"], "tp": 1}

    def tokens(**given_options):
        options = read_options("tensorrt-llm", tensorrt_llm.OPTIONS, given_options)
        found = tensorrt_llm.capacity(architecture, 9723985920 - 1, options=options, **setting)
        return found.tokens

    assert tokens() == 422048
    assert tokens(max_tokens=1000) == 1024
    assert tokens(max_tokens=10**9) == 422048


def test_blocks_are_of_sequences():
    """Each sequence rounds up by itself; a pool of the user's size rounds once."""
    point = {"seq": 33, "batch": 3, "engine": "tensorrt-llm"}
    per_token = 32 * 2 * 8 * 128 * 2
    assert size(MODELS[0], **point).total_bytes == 3 * 64 * per_token
    fixed = size(MODELS[0], options={"max_tokens": 193}, **point)
    assert fixed.total_bytes == 7 * 32 * per_token


def test_formats():
    """nvfp4 is half a byte and a scale for 16 values, V is as wide as K, latents are whole."""
    row = size(MODELS[0], seq=32, kv_dtype="nvfp4", engine="tensorrt-llm").total_bytes // 32
    assert row == 32 * 2 * 8 * 128 * 9 // 16
    mimo = size("XiaomiMiMo/MiMo-V2-Flash", seq=32, engine="tensorrt-llm").total_bytes // 32
    assert mimo == (9 * 4 + 39 * 8) * 2 * 192 * 2
    for kv_dtype, latent in [("bf16", 1152), ("fp8", 576)]:
        sparse = size(
            "deepseek-ai/DeepSeek-V3.2", seq=64, tp=8, kv_dtype=kv_dtype, engine="tensorrt-llm"
        )
        assert sparse.bytes_per_rank == 61 * 64 * (latent + 132)


def test_the_first_manager_can_be_asked_for():
    """gpt-oss's window layers then keep every token."""
    options = {"use_kv_cache_manager_v2": False}
    report = size("openai/gpt-oss-20b", seq=32768, engine="tensorrt-llm", options=options)
    assert report.total_bytes == 24 * 32768 * 2 * 8 * 64 * 2
    with pytest.raises(UnsupportedError, match="one head width"):
        size("google/gemma-4-31B-it", seq=10, engine="tensorrt-llm", options=options)


@pytest.mark.parametrize(
    ("model", "point", "error", "told"),
    [
        ("google/gemma-3-27b-it", {}, UnsupportedError, "use_kv_cache_manager_v2=false"),
        ("openai/gpt-oss-20b", {}, UnsupportedError, "sglang"),
        ("Qwen/Qwen3.5-27B", {}, UnsupportedError, "--engine model"),
        ("tiiuae/Falcon-H1-7B-Instruct", {}, UnsupportedError, "--engine model"),
        ("google/flan-t5-base", {}, UnsupportedError, "--engine model"),
        ("BAAI/bge-large-en", {}, UnsupportedError, "--engine model"),
        ("meituan-longcat/LongCat-Flash-Chat", {}, UnsupportedError, "--engine model"),
        ("deepseek-ai/DeepSeek-V4-Flash", {}, UnsupportedError, "--engine model"),
        (MODELS[0], {"kv_dtype": "q4_0"}, UnsupportedError, "llama.cpp"),
        (MODELS[4], {"kv_dtype": "nvfp4"}, UnsupportedError, "use fp8"),
        (MODELS[2], {"pp": 2}, UnsupportedError, "--pp"),
        (MODELS[0], {"options": {"tokens_per_block": 48}}, InputError, "power of two"),
        (MODELS[0], {"options": {"tokens_per_block": 0}}, InputError, "power of two"),
        (MODELS[3], {"options": {"tokens_per_block": 32}}, UnsupportedError, "blocks of 64"),
        (MODELS[0], {"options": {"max_tokens": 64}}, InputError, "do not hold"),
        (MODELS[0], {"options": {"use_kv_cache_manager_v2": True}}, UnsupportedError, "second"),
    ],
)
def test_refuses(model, point, error, told):
    """What is not known, and what can be done instead."""
    with pytest.raises(error, match=told):
        size(model, seq=100, engine="tensorrt-llm", **point)


def test_a_plan_is_not_needed():
    """Without one the defaults hold."""
    architecture, *_ = read_model(MODELS[0])
    alone = tensorrt_llm.lay_out(architecture)
    options = read_options("tensorrt-llm", tensorrt_llm.OPTIONS, {})
    assert alone == tensorrt_llm.lay_out(architecture, Plan(10, 1, FORMATS["bf16"], 1, 1, options))
