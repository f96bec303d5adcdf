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


@given(st.integers(0, 2**40), st.integers(1, 2**40))
def test_the_largest_that_holds_is_found(limit, most):
    """Bisection finds the last number that holds, or the most there may be."""
    assert _largest(lambda number: number <= limit, most) == min(limit, most)


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
    assert most == 0 or needed(seq, most) <= report.available_bytes
    assert needed(seq, most + 1) > report.available_bytes
    assert longest == 0 or needed(longest, 2) <= report.available_bytes
    assert needed(longest + 1, 2) > report.available_bytes
    assert report.fits == (most >= 2) == (longest >= seq)
    assert report.headroom_bytes == report.available_bytes - needed(seq, 2)
    json.dumps(report.to_dict())


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
    assert (report["engine"], report["seq_tokens"], report["max_concurrency"]) == ("vllm", 8192, 10)
    assert cli.run([*arguments, "--seq", "4k"]) == 0
    assert json.loads(capsys.readouterr().out)["max_concurrency"] == 20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--from", COMMAND], "--kv-memory"),
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
    assert parse_bytes("1_024", name="x") == parse_bytes(1024, name="x") == 1024
