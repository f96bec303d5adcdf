"""What users write after --strategy: budgets, words and pairs; and what is promised for them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc import cli
from kvcalc.strategies import load_strategies, load_strategy, strategy_names
from kvcalc.strategies._parameters import Budget, percent

MODEL = "meta-llama/Llama-3-8B"
ROW_BYTES = 8 * 2 * 128 * 2
"""One token's K and V rows of one of its 32 layers, in bf16."""


def size(strategy, seq="8k", **point):
    """The report of Llama-3-8B."""
    return kvcalc.size(MODEL, seq=seq, strategy=strategy, **point)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1024", 1024), ("1k", 1024), ("12.5%", 1024), ("100%", 8192), ("0.01%", 1), ("1.5k", 1536)],
)
def test_a_budget_is_tokens_or_a_part_of_the_prompt(text, tokens):
    """Both are whole numbers of tokens at 8k; a part is rounded down, to one at least."""
    budget = load_strategy(f"random:budget={text}").parameters["budget"]
    assert budget.of(8192) == tokens
    assert size(f"random:budget={text}").total_bytes == 32 * tokens * ROW_BYTES


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "12.5", "x", "1e3", "%", "", "1" * 50])
def test_a_budget_that_is_none_is_refused(text):
    """What is neither says how to write one."""
    with pytest.raises(kvcalc.InputError, match=r"12\.5%"):
        load_strategy(f"random:budget={text}")


@given(st.integers(1, 10**6), st.integers(1, 10**9))
def test_parts_of_a_prompt_are_rounded_down(prompt_tokens, billionths):
    """A part is never more than the prompt, and one token more of it would be too many."""
    kept = Budget(None, billionths).of(prompt_tokens)
    assert 1 <= kept <= prompt_tokens
    if kept > 1:
        assert kept * 10**9 <= billionths * prompt_tokens < (kept + 1) * 10**9


@given(st.floats(0.001, 100))
def test_percent_is_read_as_it_is_written(share):
    """What is printed of a budget is read as the same."""
    budget = percent(round(share, 3))
    assert load_strategy(f"random:budget={budget}").parameters["budget"] == budget


def test_every_spec_is_read_as_itself():
    """The spelled-out spec of each strategy, and of pairs, loads as the very same."""
    for name in (*strategy_names(), "snapkv+int4", "random+fp8"):
        chosen = load_strategy(name)
        again = load_strategy(chosen.spec)
        assert again == chosen
        json.dumps(chosen.plain_parameters)


def test_lists_keep_pairs_and_parameters_together():
    """A comma list falls apart where a strategy begins, not inside its parameters."""
    text = "int4:group=64,residual=32,snapkv:budget=1k,window=16+int4:group=64,residual=0,dynamic"
    assert [chosen.spec for chosen in load_strategies([text])] == [
        "dynamic",
        "int4:group=64,residual=32",
        "snapkv:budget=1024,window=16,kernel=7,pooling=max+int4:group=64,residual=0",
    ]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int4+snapkv", "cannot hand"),
        ("snapkv+dynamic", "cannot store"),
        ("h2o+int4", "cannot hand"),
        ("snapkv+int4+fp8", "unknown|cannot"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(spec, reason):
    """A pair needs one that evicts once and one that stores rows."""
    with pytest.raises(kvcalc.KvcalcError, match=reason):
        load_strategy(spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("snapkv:pooling=sum", "max or avg"),
        ("snapkv:window=1.5", "whole number"),
        ("h2o:recent_share=x", "decimal"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(spec, reason):
    """The default of a parameter says what it can be."""
    with pytest.raises(kvcalc.InputError, match=reason):
        load_strategy(spec)


def test_decoded_tokens_stand_beside_the_budget_or_in_it():
    """SnapKV keeps all that is decoded; H2O's rows never grow beyond the budget."""
    kept = size("snapkv:budget=1k", decode=64)
    assert (kept.seq_tokens, kept.decode_tokens) == (8256, 64)
    assert kept.total_bytes == 32 * (1024 + 64) * ROW_BYTES
    assert kept.bytes_per_token == 32 * ROW_BYTES
    capped = size("h2o:budget=1k", decode=64)
    assert capped.total_bytes == 32 * 1024 * (ROW_BYTES + 8 * 4)
    assert capped.bytes_per_token == 0
    assert size("dynamic", decode=64).total_bytes == 32 * 8256 * ROW_BYTES


def test_a_prompt_within_the_budget_is_kept_whole():
    """Below the budget there is nothing to evict, and the window may be as large as it."""
    assert size("snapkv:budget=32", seq=20).total_bytes == 32 * 20 * ROW_BYTES
    with pytest.raises(kvcalc.InputError, match="window"):
        size("snapkv:budget=32", seq=33)


def test_a_pair_stores_what_is_kept():
    """`snapkv+int4` is what int4 makes of a cache of as many tokens as snapkv keeps."""
    pair = size("snapkv:budget=1k+int4", decode=100)
    assert pair.total_bytes == size("int4", seq=1124).total_bytes
    assert pair.strategy.startswith("snapkv:budget=1024")


def test_windows_stay_and_are_quantised_in_a_pair():
    """Gemma's window layers keep their windows under snapkv, and are packed under snapkv+int4."""
    model = "google/gemma-3-27b-it"
    plain, packed, evicted, pair = (
        kvcalc.size(model, seq="32k", strategy=spec).groups
        for spec in ("dynamic", "int4", "snapkv", "snapkv+int4")
    )
    windows, whole = 0, 1
    assert evicted[windows] == plain[windows]
    assert pair[windows] == packed[windows]
    assert pair[whole].total_bytes < evicted[whole].total_bytes < plain[whole].total_bytes
    assert pair[whole].kind == "evicted_packed_int4"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("mistralai/Mistral-7B-v0.1", "nothing to evict"),
        ("google/gemma-3n-E4B-it", "another layer"),
        ("deepseek-ai/DeepSeek-V3.2", "index"),
    ],
)
def test_models_that_cannot_be_followed_are_refused(model, reason):
    """A model without a layer that sees all, or that keeps tokens otherwise, is refused."""
    with pytest.raises(kvcalc.UnsupportedError, match=reason):
        kvcalc.size(model, seq="8k", strategy="snapkv")


def test_the_command_line_takes_a_prompt_and_what_is_decoded(capsys):
    """`size --decode` says how many tokens come after the prompt, in JSON, too."""
    arguments = ["size", MODEL, "--seq", "8k", "--decode", "64", "--strategy", "snapkv:budget=1k"]
    assert cli.run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["seq_tokens"], report["decode_tokens"]) == (8256, 64)
    assert report["total_bytes"] == 32 * (1024 + 64) * ROW_BYTES
    assert cli.run(["size", MODEL, "--seq", "8k", "--decode", "-1"]) == 2
    assert "decode" in capsys.readouterr().err
