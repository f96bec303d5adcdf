"""What fits into the memory of a cache: bisection, exit status, and pasted command lines."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcalc
from kvcalc import cli
from kvcalc.engines import engine_names
from kvcalc.fitting import _largest
from kvcalc.units import GIB, parse_bytes

MODEL = "meta-llama/Llama-3-8B"
COMMAND = "vllm serve meta-llama/Llama-3-8B --max-model-len 8192 --port 80"


@given(
    available=st.integers(0, 2**50),
    most=st.integers(1, 2**40),
    first=st.integers(1, 2**40),
    slope=st.integers(0, 2**20),
    fixed=st.integers(0, 2**30),
    block=st.integers(1, 300),
    bound=st.integers(1, 2**41),
    step=st.integers(1, 64),
)
def test_the_largest_that_holds_is_found(available, most, first, slope, fixed, block, bound, step):
    """The last number that takes no more than there is, or the most there may be, is found in few
    steps: for blocks, for what is taken once, and where the engine itself has a bound.
    """
    asked = []

    def takes(number):
        asked.append(number)
        return math.inf if number > bound else fixed + slope * math.ceil(number / block) * block

    found = _largest(takes, available, most, min(first, most), step)
    assert found == 0 or takes(found) <= available
    assert found == most or takes(found + 1) > available
    assert all(1 <= number <= most for number in asked)
    assert len(asked) <= 92


@pytest.mark.parametrize("engine", engine_names())
@settings(max_examples=10, deadline=None)
@given(gib=st.integers(0, 40), seq=st.integers(300, 9000))
def test_what_fits_fits_and_one_more_does_not(engine, gib, seq):
    """The most requests fit, one more does not; and so for the longest sequence."""
    report = kvcalc.fit(MODEL, kv_memory=gib * GIB + 1, seq=seq, concurrency=2, engine=engine)

    def needed(tokens, batch):
        try:
            return kvcalc.size(MODEL, seq=tokens, batch=batch, engine=engine).bytes_per_rank
        except kvcalc.InputError:  # llama.cpp takes 256 sequences at most
            return math.inf

    most, longest = report.max_concurrency, report.max_tokens
    usable = report.available_bytes
    if engine == "vllm":  # one block, 16 tokens of 128 KiB, is never used
        usable = max(usable // 2**21 - 1, 0) * 2**21
    assert most == 0 or needed(seq, most) <= usable
    assert needed(seq, most + 1) > usable
    assert longest == 0 or needed(longest, 2) <= usable
    assert needed(longest + 1, 2) > usable
    assert report.fits == (most >= 2) == (longest >= seq)
    assert report.headroom_bytes == report.available_bytes - needed(seq, 2)
    json.dumps(report.to_dict())


def test_an_engines_own_pools_decide(capsys, monkeypatch):
    """Memory is not enough where vLLM does not start for its maximum, or where the pools into which
    SGLang divides it between states and tokens before requests come hold fewer than are asked.
    """
    monkeypatch.setenv("COLUMNS", "80")
    command = ["fit", "llama-3.1-8b", "--kv-memory", "4GiB", "--seq", "8k"]
    assert cli.run([*command, "--option", "max_model_len=128k"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit  3.000 GiB left, but the engine does not start" in shown
    assert "would fit with    --option max_model_len=8192" in shown
    assert cli.run([*command, "--option", "max_model_len=8192"]) == 0
    hybrid = {"kv_memory": "20GiB", "engine": "sglang", "tp": 4, "seq": "128k"}
    model = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    report = kvcalc.fit(model, **hybrid)
    assert report.printed["max_total_num_tokens"] // 2**17 == report.max_concurrency
    more = kvcalc.fit(model, **hybrid, concurrency=report.max_concurrency + 1)
    assert (more.fits, more.headroom_bytes > 0) == (False, True)
    slots = {"max_mamba_cache_size": 60}
    assert kvcalc.fit(model, **hybrid, options=slots).max_concurrency > report.max_concurrency


def test_no_more_requests_run_than_the_server_takes():
    """`max_num_seqs` bounds the most requests, and is named where more are asked for."""
    assert kvcalc.fit(MODEL, gpu="h100-sxm-80gb", seq=64).max_concurrency == 1024
    bounded = {"kv_memory": "20GiB", "seq": 64, "options": {"max_num_seqs": 16}}
    assert kvcalc.fit(MODEL, **bounded).max_concurrency == 16
    with pytest.raises(kvcalc.InputError, match="16 requests at once"):
        kvcalc.fit(MODEL, **bounded, concurrency=17)


@pytest.mark.parametrize(("memory", "status"), [("9GiB", 0), ("7.9GiB", 1), ("8 GB", 1)])
def test_the_exit_status_says_whether_it_fits(memory, status, capsys):
    """8 requests of 8k tokens take 8 GiB of Llama-3-8B's cache in vLLM."""
    arguments = ["fit", MODEL, "--kv-memory", memory, "--concurrency", "8", "--json"]
    assert cli.run(arguments) == status
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "kvcalc.fit/1"
    assert report["fits"] == (status == 0)
    assert report["needed_bytes"] == 8 * GIB


def test_a_command_line_is_a_deployment(capsys):
    """`--from` says model, engine and sizes; options beside it go before what it says."""
    arguments = ["fit", "--from", COMMAND, "--kv-memory", "10GiB", "--json"]
    assert cli.run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["engine"], report["seq_tokens"], report["max_concurrency"]) == ("vllm", 8192, 9)
    assert cli.run([*arguments, "--seq", "4k"]) == 0
    assert json.loads(capsys.readouterr().out)["max_concurrency"] == 19


WEIGHTS = 2 * 8_030_261_248
"""Bytes of Llama-3-8B in bf16, by the published count of its parameters."""

H100 = 85_030_076_416
"""What CUDA reports of an H100 SXM."""


@pytest.mark.parametrize(
    ("engine", "share", "expected"),
    [
        ("vllm", None, -(-H100 * 92 // 100) - WEIGHTS - 3 * GIB),
        ("vllm", "0.5", H100 // 2 - WEIGHTS - 3 * GIB),
        ("sglang", 0.8, -(-H100 * 8 // 10) - WEIGHTS - 3 * GIB),
        ("tensorrt-llm", None, (H100 - WEIGHTS - 3 * GIB) * 9 // 10),
        ("llama.cpp", None, H100 - WEIGHTS - 3 * GIB),
    ],
)
def test_a_gpu_leaves_what_the_engine_does_not_take(engine, share, expected):
    """The share of the engine, of all memory or of what weights leave, is added up line by line."""
    report = kvcalc.fit(MODEL, gpu="h100-sxm-80gb", share=share, reserve="3GiB", engine=engine)
    assert report.available_bytes == expected == sum(line.num_bytes for line in report.budget)
    assert report.weights_bytes == WEIGHTS
    assert [line.num_bytes for line in report.budget if line.provenance == "exact"] == [-WEIGHTS]
    assert all(line.source for line in report.budget)


def test_an_excerpt_of_a_config_gives_a_range_of_weights():
    """Gemma 2 9B's excerpt says neither dtype nor head: its 9.24 billion parameters in bf16 lie in
    the range, whose upper end counts; requirements of the weights are not known then.
    """
    report = kvcalc.fit("google/gemma-2-9b-it", gpu="l40s", seq="8k")
    (weights,) = [line for line in report.budget if line.name == "weights"]
    assert weights.provenance == "estimate"
    assert weights.num_bytes == weights.least_bytes <= -2 * 9_241_705_984 == weights.most_bytes
    assert report.weights_bytes is None


def test_weights_may_be_given():
    """`weights` takes the place of what is counted, and of what is not known."""
    given = kvcalc.fit(MODEL, gpu="h100-sxm-80gb", reserve="3GiB", weights=WEIGHTS)
    counted = kvcalc.fit(MODEL, gpu="h100-sxm-80gb", reserve="3GiB")
    assert given.available_bytes == counted.available_bytes
    assert given.weights_bytes == WEIGHTS
    with pytest.raises(kvcalc.UnsupportedError, match="or give the weights, --weights 140GB"):
        kvcalc.fit("internlm/internlm2_5-7b-chat", gpu="h100-sxm-80gb", seq=4096)
    told = kvcalc.fit(
        "internlm/internlm2_5-7b-chat", gpu="h100-sxm-80gb", seq=4096, weights="15.5 GB"
    )
    assert told.weights_bytes == 15_500_000_000


def test_weights_on_several_ranks_are_an_estimate():
    """What each rank repeats is not known, and said so; more than a GPU has leaves nothing."""
    report = kvcalc.fit(MODEL, gpu="h100-sxm-80gb", reserve="1GiB", tp=2)
    (weights,) = [line for line in report.budget if line.provenance == "estimate"]
    assert weights.num_bytes == -WEIGHTS // 2
    crowded = kvcalc.fit(MODEL, gpu="h100-sxm-80gb", reserve="90GiB")
    assert (crowded.available_bytes, crowded.max_concurrency, crowded.fits) == (0, 0, False)


def test_query_heads_are_divided_whole(capsys):
    """28 query heads on 8 ranks are refused, as engines do, with the field that decides it."""
    assert cli.run(["fit", "Qwen/Qwen2.5-7B", "--gpu", "l4", "--tp", "8"]) == 3
    assert "deciding field: num_attention_heads" in capsys.readouterr().err


def test_a_budget_is_shown_line_by_line(capsys, monkeypatch):
    """Each term says how much and whether it is known, and the command's share is the engine's."""
    monkeypatch.setenv("COLUMNS", "80")
    command = f"{COMMAND} --gpu-memory-utilization 0.5"
    gpu = ["--gpu", "h100-sxm-80gb", "--reserve", "3GiB"]
    assert cli.run(["fit", "--from", command, *gpu]) == 0
    shown = capsys.readouterr().out
    assert "gpu_memory_utilization 0.5" in shown
    for term in ("device memory", "left to others", "weights", "reserve", "cache memory"):
        assert term in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--from", COMMAND], "--kv-memory"),
        ([MODEL, "--gpu", "h100", "--reserve", "1GiB"], "h100-sxm-80gb"),
        ([MODEL, "--gpu", "h100-sxm-80gb", "--reserve", "1GiB", "--share", "1.5"], "--share"),
        ([MODEL, "--gpu", "t4", "--kv-memory", "1GiB"], "leave --gpu"),
        (
            [MODEL, "--reserve", "1GiB", "--kv-memory", "1GiB"],
            "leave --gpu, --reserve and --weights",
        ),
        ([MODEL, "--gpu", "absent.yaml", "--reserve", "1GiB"], "cannot read absent.yaml"),
        ([MODEL, "--gpu", "t4", "--reserve", "1GiB", "--tp", "0"], "tp must be at least 1"),
        ([MODEL, "--gpu", "t4", "--reserve", "1GiB", "--pp", "-1"], "pp must be at least 1"),
        (["--from", f"{COMMAND} --new 1", "--kv-memory", "1GiB"], "--new"),
        (["--from", COMMAND, MODEL, "--kv-memory", "1GiB"], "leave MODEL"),
        ([MODEL], "--kv-memory"),
        ([MODEL, "--kv-memory", "1 parsec"], "20GiB"),
        ([MODEL, "--kv-memory", "1GiB", "--option", "n_ctx"], "name=value"),
        ([MODEL, "--kv-memory", "1GiB", "--option", "n_ctx=1"], "no option 'n_ctx'"),
        ([MODEL, "--kv-memory", "1GiB", "--concurrency", "0"], "concurrency"),
    ],
)
def test_bad_questions_get_one_line(arguments, reason, capsys):
    """Each says what is wrong with it, on standard error, with the status of bad input."""
    assert cli.run(["fit", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert reason in said.err


def test_bytes_mean_what_they_say():
    """GB are 10^9 bytes and GiB 2^30."""
    assert parse_bytes("1.5GiB", name="x") == 3 * 2**29
    assert parse_bytes("80 GB", name="x") == 80 * 10**9
    assert parse_bytes("1_048_576", name="x") == parse_bytes(2**20, name="x") == 2**20
    assert parse_bytes("7B", name="x") == parse_bytes(7, name="x") == 7
    line = "(EngineCore pid=7) INFO 07-25 13:42:16 [x.py:1] Available KV cache memory: 12.5 GiB"
    assert parse_bytes(line, name="x") == 25 * 2**29


@pytest.mark.parametrize("said", ["12.3", "3", "1_024", "4:5", "12.3G"])
def test_a_number_without_a_unit_is_asked_for_one(said):
    """What a log has as 12.3 GiB is not taken for 12 bytes."""
    with pytest.raises(kvcalc.InputError, match="GiB"):
        kvcalc.fit(MODEL, kv_memory=said, seq="8k")


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve meta-llama/Llama-3.1-8B --max-model-len 65536",
        "vllm serve meta-llama/Llama-3.1-8B",
        "llama-server -hf meta-llama/Llama-3.1-8B -c 65536",
        "llama-server -hf meta-llama/Llama-3.1-8B -c 131072 -np 2",
    ],
)
def test_a_fixed_length_is_answered_with_the_one_that_fits(command, capsys):
    """Where a server does not start for the length that it is given, the longest that it starts for
    is named; a little more is too much.
    """
    number = 2 if "-np" in command else 1
    deployment = ["fit", "--kv-memory", "3GiB", "--concurrency", str(number), "--from", command]
    assert cli.run([*deployment, "--json"]) == 1
    changes = json.loads(capsys.readouterr().out)["changes_that_fit"]
    (change,) = [change for change in changes if change.startswith("--seq")]
    _, tokens, _, option = change.split()
    name, length = option.split("=")
    assert int(tokens) > 4096
    assert int(length) == int(tokens) * (number if name == "n_ctx" else 1)
    assert cli.run([*deployment, *change.split(), "--json"]) == 0
    more = int(tokens) + 256
    longer = ["--seq", str(more), "--option", f"{name}={more * int(length) // int(tokens)}"]
    assert cli.run([*deployment, *longer, "--json"]) == 1


def test_what_would_make_it_fit_does(capsys):
    """Each change that is named makes the deployment fit, alone."""
    deployment = ["fit", MODEL, "--gpu", "rtx-4090", "--reserve", "1GiB", "--concurrency", "10"]
    assert cli.run([*deployment, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["changes_that_fit"]) == 5
    for change in report["changes_that_fit"]:
        assert cli.run([*deployment, *change.split(), "--json"]) == 0, change
        assert json.loads(capsys.readouterr().out)["changes_that_fit"] == []
    assert cli.run(deployment) == 1
    assert "would fit with" in capsys.readouterr().out


def test_a_gpu_before_ampere_computes_in_fp16(capsys, monkeypatch):
    """The answer says so, refuses an fp8 cache there, and does not advise one."""
    monkeypatch.setenv("COLUMNS", "200")
    command = ["fit", "Qwen/Qwen3-0.6B", "--gpu", "t4", "--seq", "40k", "--concurrency", "4"]
    assert cli.run(command) == 1
    shown = capsys.readouterr().out
    assert "tokens, fp16, engine vllm" in shown
    assert "note: t4: before compute capability 8.0 an engine computes in fp16" in shown
    assert "--kv-dtype fp8" not in shown
    assert cli.run([*command, "--kv-dtype", "fp8"]) == 3
    assert "needs compute capability 8.0" in capsys.readouterr().err


def test_slots_of_states_bound_models_that_have_states():
    """SGLang's max_mamba_cache_size means nothing to a model of full attention."""
    point = {"kv_memory": "40GiB", "engine": "sglang", "seq": 1024, "concurrency": 50}
    options = {"max_mamba_cache_size": 64}
    assert kvcalc.fit(MODEL, **point, options=options).fits
    with pytest.raises(kvcalc.InputError, match="12 requests at once"):
        kvcalc.fit("Qwen/Qwen3-Next-80B-A3B-Instruct", **point, options=options)


@pytest.mark.parametrize("printed", ["-1.5 GiB", "Available KV cache memory: -0.2 GiB"])
def test_a_log_that_has_nothing_left_is_told(printed):
    """What vLLM prints is less than nothing where weights exceed its share."""
    with pytest.raises(kvcalc.InputError, match="nothing left for its cache"):
        kvcalc.fit(MODEL, kv_memory=printed, seq="8k")
