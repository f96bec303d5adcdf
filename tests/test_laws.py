"""Laws of sizing that hold for every layer, model, length and number of ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc.dtypes import FORMATS
from kvcalc.errors import InputError
from kvcalc.layers import FullAttention, LatentAttention, SlidingAttention
from kvcalc.units import GIB, KIB, MIB, format_bytes, parse_tokens

MODELS = (
    "meta-llama/Meta-Llama-3-8B",
    "google/gemma-3-27b-it",
    "openai/gpt-oss-20b",
    "mistralai/Mistral-7B-v0.1",
    "deepseek-ai/DeepSeek-V3",
    "google/gemma-2b",
)

models = st.sampled_from(MODELS)
lengths = st.integers(1, 2**20)
dims = st.sampled_from([32, 64, 96, 128])
heads = st.integers(1, 16)
formats = st.sampled_from(sorted(FORMATS)).map(FORMATS.__getitem__)


@given(models, lengths, lengths)
def test_more_tokens_never_take_less(model, first, second):
    """The plain cache grows with the sequence or stays."""
    shorter, longer = sorted((first, second))
    assert kvcalc.size(model, seq=shorter).total_bytes <= kvcalc.size(model, seq=longer).total_bytes


@given(models, lengths, st.integers(1, 64))
def test_the_total_is_the_sum_of_layers_and_sequences(model, seq, batch):
    """Layers add up to the total, and sequences cost the same each."""
    report = kvcalc.size(model, seq=seq, batch=batch)
    assert report.total_bytes == sum(layer.bytes for layer in report.layers)
    assert report.total_bytes == batch * report.bytes_per_sequence
    assert [layer.index for layer in report.layers] == list(range(len(report.layers)))


@given(models, lengths)
def test_segments_are_the_whole_line(model, seq):
    """The last segment that starts at or before a length gives its bytes and its slope."""
    report = kvcalc.size(model, seq=seq)
    segment = [one for one in report.segments if one.from_tokens <= seq][-1]
    assert segment.fixed_bytes + segment.bytes_per_token * seq == report.bytes_per_sequence
    assert segment.bytes_per_token == report.bytes_per_token


@given(models, lengths)
def test_bytes_per_token_is_the_next_token(model, seq):
    """The marginal cost is the difference to one more token."""
    here, there = kvcalc.size(model, seq=seq), kvcalc.size(model, seq=seq + 1)
    assert here.bytes_per_token == there.total_bytes - here.total_bytes


@given(heads, dims, dims, st.integers(1, 9000), lengths, formats)
def test_a_window_never_takes_more_than_full_attention(count, key, value, window, seq, dtype):
    """A window layer is a full layer until its window is filled, and constant from there."""
    full = FullAttention(kv_heads=count, key_dim=key, value_dim=value)
    sliding = SlidingAttention(kv_heads=count, key_dim=key, value_dim=value, window=window)
    point = {"batch": 2, "dtype": dtype}
    kept = full.num_bytes(tokens=min(seq, window), **point)
    assert sliding.num_bytes(tokens=seq, **point) == kept
    assert kept <= full.num_bytes(tokens=seq, **point)


@given(heads, st.integers(1, 32), lengths)
def test_shards_cover_the_whole(count, tp, seq):
    """Ranks together keep at least what one rank would, and exactly that when heads divide."""
    layer = FullAttention(kv_heads=count, key_dim=64, value_dim=64)
    point = {"tokens": seq, "batch": 1, "dtype": FORMATS["bf16"]}
    if count % tp and tp % count:
        with pytest.raises(kvcalc.UnsupportedError):
            layer.shard(tp)
        return
    ranks = tp * layer.shard(tp).num_bytes(**point)
    assert ranks >= layer.num_bytes(**point)
    assert (ranks == layer.num_bytes(**point)) == (count % tp == 0)


@given(st.integers(1, 32))
def test_latents_are_replicated(tp):
    """Every tensor-parallel rank keeps the whole latent."""
    layer = LatentAttention(
        latent_dim=512, rope_dim=64, num_heads=128, nope_dim=128, head_value_dim=128
    )
    assert layer.shard(tp) == layer
    report = kvcalc.size("deepseek-ai/DeepSeek-V3", seq=1000, tp=tp)
    assert report.total_bytes == tp * report.bytes_per_rank


@given(models, st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2]))
def test_pipeline_stages_split_the_layers(model, pp, batch):
    """The largest stage is between an even share and the whole; the total does not change."""
    report = kvcalc.size(model, seq=5000, pp=pp, batch=batch)
    assert report.total_bytes == kvcalc.size(model, seq=5000, batch=batch).total_bytes
    assert report.total_bytes <= pp * report.bytes_per_rank
    assert report.bytes_per_rank <= report.total_bytes


@given(models, lengths)
def test_strategies_relate_to_the_plain_cache(model, seq):
    """A static cache is the plain one and its counters; int4 is never larger than the plain one."""
    plain = kvcalc.size(model, seq=seq)
    static = kvcalc.size(model, seq=seq, strategy="static")
    assert static.total_bytes == plain.total_bytes + 8 * len(plain.layers)
    assert kvcalc.size(model, seq=seq, strategy="int4").total_bytes <= plain.total_bytes


@given(st.integers(1, 2**40))
def test_a_printed_count_parses_back(tokens):
    """Plain, grouped and suffixed counts read as the number they were printed from."""
    assert parse_tokens(str(tokens)) == parse_tokens(f"{tokens:_}") == tokens
    if tokens <= 2**20:
        assert parse_tokens(f"{tokens}k") == parse_tokens(f"{tokens}K") == tokens * 1024


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128k", 131_072), ("1M", 1_048_576), ("1.5k", 1536), ("8_192", 8192), (" 7 ", 7)],
)
def test_token_suffixes_are_binary(text, tokens):
    """128k is 131,072 tokens in either case of the letter."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1,024", "1.3k", "1e9", "12q", "nan", "٣", "9" * 33, "2T"]
)
def test_what_is_no_count_is_refused(text):
    """Anything but a positive whole number of tokens is an InputError that shows it."""
    with pytest.raises(InputError, match="--seq"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("num_bytes", "printed"),
    [
        (0, "0 B"),
        (KIB - 1, "1023 B"),
        (KIB, "1.00 KiB"),
        (MIB, "1.00 MiB"),
        (16 * GIB, "16.000 GiB"),
        (11_173_625_856, "10.406 GiB"),
    ],
)
def test_bytes_are_printed_in_binary_units(num_bytes, printed):
    """GiB means 2**30, and is printed to a thousandth."""
    assert format_bytes(num_bytes) == printed


@pytest.mark.parametrize(
    ("name", "elements", "num_bytes"),
    [("q8_0", 32, 34), ("q4_0", 32, 18), ("q5_1", 64, 48), ("nvfp4", 16, 9), ("mxfp4", 32, 17)],
)
def test_block_formats_count_their_scales(name, elements, num_bytes):
    """A block format's row is a whole number of blocks, scales included."""
    assert FORMATS[name].row_bytes(elements) == num_bytes
    with pytest.raises(kvcalc.UnsupportedError, match="blocks"):
        FORMATS[name].row_bytes(elements + 1)
