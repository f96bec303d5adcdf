"""vLLM: lines that real engines printed, laws of its layout, and what it cannot do.

The lines are of several versions (0.7 to 0.24) where each uses the rules of 0.33.0; settings of a
row say where a version or a GPU did otherwise. Memory was printed with two decimals.
"""

from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvcalc
from kvcalc import UnsupportedError
from kvcalc.api import read_model
from kvcalc.dtypes import storage_format
from kvcalc.engines import Plan, read_options, vllm
from kvcalc.errors import InputError
from kvcalc.units import GIB

PIXTRAL = {
    "model_type": "mistral",
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}
DISTILLED_QWEN = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "use_sliding_window": False,
}
QWEN35_2B = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
}
QWEN36 = "nvidia/Qwen3.6-35B-A3B-NVFP4"
GEMMA4 = "google/gemma-4-26B-A4B-it"
GLM51 = "zai-org/GLM-5.1"

UNCACHED = {"enable_prefix_caching": False}
NO_CHECKPOINT = {"enable_prefix_caching": True, "num_prefill_checkpoint_blocks": 0}
SYNCHRONOUS = {"async_scheduling": False, "max_num_batched_tokens": 2048}
ASYNCHRONOUS = {"async_scheduling": True, "max_num_batched_tokens": 2048}


class Printed(NamedTuple):
    """A line: tokens and concurrency ("" where none was printed) for `length` tokens a request."""

    record: str
    model: Any
    dtype: str
    tp: int
    options: dict[str, Any]
    length: int
    memory_gib: float
    tokens: int
    concurrency: str


PRINTED = [
    Printed(*row)
    for row in (
        ("vllm-003", "meta-llama/Llama-3.2-3B-Instruct", "fp16", 1, {}, 2048, 6.22, 58192, "28.41"),
        ("vllm-005", "meta-llama/Llama-3.1-8B-Instruct", "fp16", 1, {}, 1024, 2.39, 19584, "19.12"),
        (
            "vllm-006",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "bf16",
            1,
            {},
            1024,
            9.53,
            78080,
            "76.25",
        ),
        ("vllm-007", "microsoft/phi-4", "fp16", 1, {}, 512, 1.24, 6496, "12.69"),
        ("vllm-008", "Qwen/Qwen2.5-3B-Instruct", "fp16", 1, {}, 1024, 4.01, 116800, "114.06"),
        (
            "vllm-011",
            "meta-llama/Llama-3.2-1B-Instruct",
            "bf16",
            1,
            {},
            2048,
            17.2,
            563744,
            "275.27",
        ),
        ("vllm-012", "Qwen/Qwen3-8B", "bf16", 1, {}, 2048, 8.98, 65376, "31.92"),
        ("vllm-016", PIXTRAL, "bf16", 1, {}, 8192, 10.53, 69024, ""),
        ("vllm-018", "Qwen/Qwen3-14B", "bf16", 1, {}, 32768, 6.51, 42656, "1.30"),
        ("vllm-022", GLM51, "fp8", 8, {"mtp": True}, 202752, 25.09, 432832, "2.13"),
        ("vllm-031", DISTILLED_QWEN, "bf16", 1, {}, 2048, 2.46, 91968, ""),
        ("vllm-036", "meta-llama/Llama-3.1-8B", "bf16", 1, {}, 2048, 5.29, 43296, ""),
        ("vllm-037", "meta-llama/Llama-3.3-70B-Instruct", "fp8", 1, {}, 32000, 5.11, 33504, "1.05"),
        ("vllm-052", QWEN36, "bf16", 1, UNCACHED, 131072, 47.55, 623040, "18.44"),
        ("vllm-053", QWEN36, "fp8", 1, NO_CHECKPOINT, 131072, 6.01, 569878, "4.35"),
        ("vllm-054", QWEN36, "fp8", 1, NO_CHECKPOINT, 131072, 5.98, 567978, "4.33"),
        (
            "vllm-056",
            "Qwen/Qwen3.5-122B-A10B",
            "fp8",
            1,
            {**NO_CHECKPOINT, "mtp": True},
            262144,
            24.05,
            482080,
            "6.42",
        ),
        ("vllm-057", GEMMA4, "fp8", 1, SYNCHRONOUS, 131072, 51.62, 451040, "33.42"),
        ("vllm-059", GEMMA4, "bf16", 1, ASYNCHRONOUS, 8192, 44.03, 192368, "38.76"),
        ("vllm-063", QWEN35_2B, "bf16", 1, UNCACHED, 262144, 5.95, 129472, "1.97"),
    )
]

BY_REQUESTS = ("vllm-053", "vllm-054")
"""Records of versions that print tokens as 0.33.0 does; older ones counted blocks of a group."""

# bytes of a block, blocks of a request, groups, tokens of an attention block
BLOCKS = {
    "vllm-052": (21626880, 128, 4, 1056),
    "vllm-053": (21463040, 69, 4, 2096),
    "vllm-054": (21463040, 69, 4, 2096),
    "vllm-056": (55803904, 72, 4, 4192),
    "vllm-057": (327680, 5061, 6, 16),
    "vllm-059": (655360, 1861, 6, 16),
    "vllm-063": (6684672, 485, 4, 544),
}

NOT_REPRODUCED = {
    "vllm-019": "memory is printed for one rank, blocks are the fewest of four: 1 % apart",
    "vllm-042": "the draft model is another checkpoint, whose config is not the model's",
    "vllm-049": "29 layers were counted where the config has 28; nobody knows why",
}


def pool(model, length, *, dtype="bf16", tp=1, pp=1, **options):
    """The blocks of a rank."""
    architecture, *_ = read_model(model)
    read = read_options("vllm", vllm.OPTIONS, {"max_model_len": length, **options})
    plan = Plan(length, 1, storage_format(dtype), tp, pp, read)
    return vllm.pool(architecture, plan)


def printed_tokens(record, blocks, memory_bytes):
    """The figure as the version of the record counted it."""
    capacity = blocks.capacity(memory_bytes)
    if record in BY_REQUESTS:
        return capacity.tokens
    return capacity.num_blocks // blocks.num_groups * blocks.block_size


@pytest.mark.parametrize("line", PRINTED, ids=lambda line: line.record)
def test_an_engine_printed_the_same(line):
    """Tokens and concurrency lie where the printed memory, rounded as it is, puts them."""
    blocks = pool(line.model, line.length, dtype=line.dtype, tp=line.tp, **line.options)
    low, high = (int((line.memory_gib + step) * GIB) for step in (-0.005, 0.005))
    assert printed_tokens(line.record, blocks, low) <= line.tokens
    assert line.tokens <= printed_tokens(line.record, blocks, high)
    if line.record in BLOCKS:
        assert blocks[:4] == BLOCKS[line.record]
    if line.concurrency:
        least, most = (blocks.capacity(memory).max_concurrency for memory in (low, high))
        assert least <= float(line.concurrency) <= most


def test_one_request_needs_what_an_engine_said():
    """vllm-037 and vllm-048: "To serve at least one request" with 131,072 tokens."""
    target = "meta-llama/Llama-3.3-70B-Instruct"
    assert pool(target, 131072, dtype="fp8").needed_bytes == 20 * GIB
    drafted = [pool(name, 131072, tp=2) for name in (target, "meta-llama/Llama-3.2-3B-Instruct")]
    assert sum(each.needed_bytes for each in drafted) == 27 * GIB


def test_records_that_are_not_reproduced_miss_by_what_is_said():
    """Each reason holds: one rank's memory, one more layer."""
    assert set(NOT_REPRODUCED) == {"vllm-019", "vllm-042", "vllm-049"}
    ranks = pool("Qwen/Qwen3-235B-A22B", 4096, tp=4)
    assert ranks.bytes_per_block == 16 * 48128
    assert 1 < printed_tokens("vllm-019", ranks, int(8.11 * GIB)) / 178880 < 1.013
    plain = pool("meta-llama/Llama-3.1-8B-Instruct", 131072)
    drafting = (plain.bytes_per_block * 33 // 32) * 410128 // 16
    assert drafting / GIB == pytest.approx(51.63, abs=0.005)
    cosmos = pool("Qwen/Qwen3-VL-2B-Instruct", 262144)
    assert cosmos.needed_bytes * 29 // 28 == 29 * GIB


@pytest.mark.parametrize(
    ("dtype", "options", "bytes_per_token"),
    [
        ("bf16", {}, 32 * 8 * 512),
        ("fp32", {}, 32 * 8 * 1024),
        ("fp8", {}, 32 * 8 * 256),
        ("fp8", {"per_token_head": True}, 32 * 8 * (256 + 8)),
        ("int8", {}, 32 * 8 * (256 + 8)),
        ("int4", {}, 32 * 8 * (128 + 8)),
        ("nvfp4", {}, 32 * 8 * 2 * (64 + 8)),
    ],
)
def test_formats_of_heads(dtype, options, bytes_per_token):
    """Scales stand in the page where they belong to tokens."""
    assert pool("meta-llama/Meta-Llama-3-8B", 16, dtype=dtype, **options).needed_bytes == (
        16 * bytes_per_token
    )


@pytest.mark.parametrize(
    ("dtype", "options", "row"),
    [("bf16", {}, 1152), ("fp8", {}, 656), ("fp8", {"fp8_ds_mla": False}, 576), ("nvfp4", {}, 352)],
)
def test_formats_of_latents_with_an_indexer(dtype, options, row):
    """The index key keeps its 132 bytes whatever the latent is kept in, on every rank."""
    for tp in (1, 8):
        blocks = pool("deepseek-ai/DeepSeek-V3.2", 64, dtype=dtype, tp=tp, **options)
        assert blocks.needed_bytes == 64 * 61 * (row + 132)
    assert pool("deepseek-ai/DeepSeek-V3", 64, dtype="fp8").needed_bytes == 64 * 61 * 576


@pytest.mark.parametrize(
    ("engine", "model", "dtype", "options", "said"),
    [
        ("vllm", "deepseek-v3.2", "fp8", {}, False),
        ("vllm", "deepseek-v3.2", "fp8", {"fp8_ds_mla": "false"}, True),
        ("vllm", "deepseek-v3", "fp8", {}, True),
        ("vllm", "llama-3-8b", "fp8", {}, True),
        ("vllm", "llama-3-8b", "fp8", {"per_token_head": "true"}, False),
        ("vllm", "llama-3-8b", "int8", {}, False),
        ("vllm", "llama-3-8b", "int4", {}, False),
        ("sglang", "deepseek-v3.2", "fp8", {}, False),
        ("sglang", "deepseek-v3.2", "fp8", {"dsa_trtllm": "true"}, True),
        ("sglang", "deepseek-v3", "fp8", {}, True),
        ("tensorrt-llm", "llama-3-8b", "fp8", {}, True),
        ("model", "deepseek-v3.2", "fp8", {}, True),
    ],
)
def test_the_payload_alone_is_said_where_it_is_counted(engine, model, dtype, options, said):
    """A note says that scales are left out, but not where the rows of an engine hold them."""
    report = kvcalc.size(model, seq="4k", engine=engine, kv_dtype=dtype, options=options)
    assert any("payload alone" in note for note in report.notes) == said


def test_indexers_that_are_shared_have_no_page():
    """GLM-5.2: 21 of 78 layers own an indexer."""
    assert pool("zai-org/GLM-5.2", 64, dtype="fp8").needed_bytes == 64 * (78 * 656 + 21 * 132)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("Qwen/Qwen3.5-27B", UNCACHED, (784, 1)),
        ("Qwen/Qwen3.5-27B", {**UNCACHED, "mtp": True}, (800, 2)),
        ("Qwen/Qwen3.5-27B", {}, (832, 3)),
        ("tiiuae/Falcon-H1-7B-Instruct", UNCACHED, (1568, 1)),
        ("tiiuae/Falcon-H1-7B-Instruct", {}, (1568, 3)),
        ("LiquidAI/LFM2-1.2B", {}, (16, 2)),
    ],
)
def test_states_decide_how_long_a_block_is(model, options, expected):
    """A page of attention holds the states of a layer, with a column for each drafted token."""
    blocks = pool(model, 1, **options)
    tokens, copies = expected
    assert blocks.block_size == tokens
    assert blocks.blocks_per_request == 1 + copies * (blocks.num_groups - 1)


def test_groups_are_padded_to_one_size():
    """Gemma 3 has 52 window and 10 full layers: six groups of ten window layers, eight empty."""
    blocks = pool("google/gemma-3-27b-it", 32768)
    assert blocks.num_groups == 7
    report = kvcalc.size("google/gemma-3-27b-it", seq=32768, engine="vllm")
    padding = [group for group in report.groups if group.kind == "padding"]
    assert [len(group.indices) for group in padding] == [8]
    # window 1024 and 2 × 8192 tokens in flight
    window = -(-(1023 + 2 * 8192) // 16) + 1
    assert report.total_bytes == (2048 + 6 * window) * blocks.bytes_per_block


def test_nearly_equal_groups_take_the_larger_size():
    """gpt-oss-20b: 12 window and 12 full layers, with one drafting layer it would be 13 and 13."""
    full = vllm.Spec(kind="full", page_bytes=512, used_bytes=512, block_tokens=16)
    window = vllm.Spec(
        kind="window", page_bytes=512, used_bytes=512, block_tokens=16, limit=127, extra_blocks=1
    )
    groups = vllm.group_specs([full] * 13 + [window] * 12)
    assert groups.bytes_per_block == 13 * 512
    assert [(group.num_layers, group.padding) for group in groups.groups] == [(13, 0), (12, 1)]
    groups = vllm.group_specs([full] * 8 + [window] * 12)
    assert [(group.num_layers, group.padding) for group in groups.groups] == [
        (8, 0),
        (6, 2),
        (6, 2),
    ]


def test_smaller_pages_hold_more_tokens_or_are_padded():
    """Two pages to one make blocks of 32 tokens; three to two leave a third of a page empty."""
    large = vllm.Spec(
        kind="window", page_bytes=768, used_bytes=768, block_tokens=16, limit=127, extra_blocks=1
    )
    half = vllm.Spec(kind="full", page_bytes=384, used_bytes=384, block_tokens=16)
    stored = vllm.group_specs([large, half]).changed[half]
    assert (stored.page_bytes, stored.block_tokens) == (768, 32)
    odd = vllm.Spec(kind="full", page_bytes=512, used_bytes=512, block_tokens=16)
    stored = vllm.group_specs([large, odd]).changed[odd]
    assert (stored.page_bytes, stored.used_bytes, stored.block_tokens) == (768, 512, 16)
    latent = vllm.Spec(kind="latent", page_bytes=512, used_bytes=512, block_tokens=16)
    with pytest.raises(UnsupportedError, match="cannot pad a latent"):
        vllm.group_specs([large, latent])


def test_a_block_is_never_used():
    """An engine with memory for exactly one request does not start; with one block more it does."""
    blocks = pool("meta-llama/Meta-Llama-3-8B", 8192)
    assert not blocks.capacity(blocks.needed_bytes).fits
    enough = blocks.capacity(blocks.needed_bytes + blocks.bytes_per_block)
    assert enough.fits
    assert enough.num_blocks == 513


def test_room_is_what_is_printed():
    """vllm-018, by the names of vLLM's cache config."""
    architecture, *_ = read_model("Qwen/Qwen3-14B")
    plan = Plan(32768, 1, storage_format("bf16"), 1, 1, read_options("vllm", vllm.OPTIONS, {}))
    assert vllm.room(architecture, plan, 42656 * 163840 + 99) == {
        "num_gpu_blocks": 2666,
        "kv_cache_size_tokens": 42656,
        "kv_cache_max_concurrency": 1.3,
        "needed_for_one_request_bytes": 5 * GIB,
        "starts": True,
    }


MODELS = (
    "meta-llama/Meta-Llama-3-8B",
    "google/gemma-3-27b-it",
    "openai/gpt-oss-20b",
    "google/gemma-4-E4B-it",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "mistralai/Mistral-7B-v0.1",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3.2",
    "XiaomiMiMo/MiMo-V2-Flash",
)
HYBRIDS = (
    "Qwen/Qwen3.5-27B",
    "tiiuae/Falcon-H1-7B-Instruct",
    "nvidia/Nemotron-H-47B-Reasoning-128K",
    "LiquidAI/LFM2-1.2B",
    "ai21labs/Jamba-v0.1",
    "tiiuae/falcon-mamba-7b",
)
LENGTHS = st.integers(1, 2**20)
AS_COMPUTED = {"mamba_ssm_cache_dtype": "fp32"}


@settings(deadline=None)
@given(st.sampled_from(MODELS + HYBRIDS), LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_allocated_holds_what_must_be_kept(model, seq, batch, tp):
    """Blocks are never smaller than the cache of the architecture, states in float32."""
    point = {"seq": seq, "batch": batch, "kv_dtype": "bf16", "tp": tp}
    allocated = kvcalc.size(model, engine="vllm", options=AS_COMPUTED, **point)
    assert allocated.total_bytes >= kvcalc.size(model, **point).total_bytes
    assert allocated.total_bytes == batch * allocated.bytes_per_sequence


@settings(deadline=None)
@given(st.sampled_from(MODELS + HYBRIDS), LENGTHS, LENGTHS)
def test_more_tokens_never_allocate_less(model, first, second):
    """Reservations grow with the length of a request or stay."""
    shorter, longer = sorted((first, second))
    sizes = [kvcalc.size(model, seq=seq, engine="vllm").total_bytes for seq in (shorter, longer)]
    assert sizes[0] <= sizes[1]


@settings(deadline=None)
@given(st.sampled_from(MODELS), LENGTHS, st.sampled_from([2, 4, 8, 16]))
def test_shards_and_replicas_cover_the_total(model, seq, tp):
    """Ranks together allocate at least what one would; a latent is on each of them."""
    alone = kvcalc.size(model, seq=seq, engine="vllm").total_bytes
    try:
        together = kvcalc.size(model, seq=seq, engine="vllm", tp=tp)
    except UnsupportedError:
        assume(False)  # heads that can be neither split nor replicated
    assert together.total_bytes >= alone
    assert together.bytes_per_rank * tp == together.total_bytes
    if "DeepSeek" in model:
        assert together.bytes_per_rank == alone


@settings(deadline=None)
@given(st.sampled_from(MODELS + HYBRIDS), LENGTHS, st.sampled_from([1, 2, 4]))
def test_a_report_is_what_a_request_needs(model, seq, tp):
    """The layers with their padding are the blocks of the pool."""
    report = kvcalc.size(model, seq=seq, kv_dtype="bf16", engine="vllm", tp=tp)
    assert report.bytes_per_rank == pool(model, seq, tp=tp).needed_bytes


def test_pipeline_stages_of_one_group():
    """Half of the layers make half of a block."""
    report = kvcalc.size("meta-llama/Meta-Llama-3-8B", seq=8192, engine="vllm", pp=2)
    stage = pool("meta-llama/Meta-Llama-3-8B", 8192, pp=2)
    assert report.bytes_per_rank == stage.needed_bytes == report.total_bytes // 2


@pytest.mark.parametrize(
    ("model", "point", "reason"),
    [
        ("deepseek-ai/DeepSeek-V4-Flash", {}, "--engine model"),
        ("MiniMaxAI/MiniMax-M3", {}, "--engine model"),
        ("google/recurrentgemma-2b", {}, "does not run the states.*transformers"),
        ("ibm-ai-platform/Bamba-9B", {}, "does not run the states.*transformers"),
        ("MiniMaxAI/MiniMax-Text-01", {}, "does not run the states"),
        ("openbmb/MiniCPM3-4B", {}, "keeps no latents.*--engine model"),
        ("google-t5/t5-small", {"encoder_seq": 5}, "Whisper alone"),
        ("meta-llama/Meta-Llama-3-8B", {"kv_dtype": "q8_0"}, "llama.cpp"),
        ("meta-llama/Meta-Llama-3-8B", {"kv_dtype": "int2"}, "not int2"),
        ("meta-llama/Meta-Llama-3-8B", {"tp": 3}, "neither split evenly"),
        ("deepseek-ai/DeepSeek-V3", {"kv_dtype": "int8"}, "no such latents in int8"),
        ("deepseek-ai/DeepSeek-V3", {"kv_dtype": "nvfp4"}, "no such latents in nvfp4"),
        ("XiaomiMiMo/MiMo-V2-Flash", {"kv_dtype": "nvfp4"}, "different widths"),
        ("google/gemma-3-27b-it", {"pp": 2}, "pipeline stages are not covered"),
        ("Qwen/Qwen3.5-27B", {"tp": 32}, "not split evenly"),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", {}, "num_prefill_checkpoint_blocks"),
        ("meta-llama/Meta-Llama-3-8B", {"options": {"mtp": True}}, "more prediction layers"),
    ],
)
def test_what_is_not_exactly_known_is_refused(model, point, reason):
    """With the reason, and what to use instead."""
    with pytest.raises(UnsupportedError, match=reason):
        kvcalc.size(model, seq=4096, engine="vllm", **point)


def test_windows_in_some_layers_of_qwen2():
    """All layers slide, or none does."""
    config = {
        **DISTILLED_QWEN,
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 21,
    }
    with pytest.raises(UnsupportedError, match="all layers or in none"):
        kvcalc.size(config, seq=4096, engine="vllm")
    config["max_window_layers"] = 0
    assert kvcalc.size(config, seq=4096, engine="vllm").groups[0].kind == "sliding_attention_blocks"


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("meta-llama/Meta-Llama-3-8B", {"block_size": 24}, "multiple of 16"),
        ("deepseek-ai/DeepSeek-V3.2", {"block_size": 16}, "multiple of 64"),
        ("meta-llama/Meta-Llama-3-8B", {"block_size": 0}, "at least 1"),
        ("meta-llama/Meta-Llama-3-8B", {"max_num_batched_tokens": 0}, "at least 1"),
        ("meta-llama/Meta-Llama-3-8B", {"max_model_len": 4095}, "max_model_len 4,095"),
        ("meta-llama/Meta-Llama-3-8B", {"gpu_memory": 1}, "no option"),
    ],
)
def test_options_that_cannot_be(model, options, reason):
    """Named with their values."""
    with pytest.raises(InputError, match=reason):
        kvcalc.size(model, seq=4096, engine="vllm", options=options)


def test_whisper_reserves_the_encoder_as_a_step_of_tokens():
    """Cross attention takes blocks for `max_num_batched_tokens`, whatever the audio is."""
    blocks = pool("openai/whisper-large-v3-turbo", 448, max_num_batched_tokens=2048)
    assert (blocks.num_groups, blocks.blocks_per_request) == (2, 28 + 128)
