"""Plans: the fewest of each GPU that hold the requests."""

import json

import pytest

import kvcalc
from kvcalc import cli
from kvcalc.hardware import gpu_ids, load_gpu
from kvcalc.planning import RANKS, plan

MODEL = "meta-llama/Llama-3-8B"
POINT = {"seq": "8k", "concurrency": 20}


def test_the_fewest_ranks_that_fit_are_named():
    """Each deployment fits, one with fewer of the same GPUs does not, and none that fits is left
    out; the least memory comes first.
    """
    found = plan(MODEL, reserve="2GiB", kv_dtypes=("auto",), **POINT)
    named = {one.gpu: one.tp for one in found}
    assert len(found) == len(named) > 15
    for gpu in gpu_ids():
        if load_gpu(gpu).usable_bytes is None:
            assert gpu not in named
            continue
        fitting = [
            tp for tp in RANKS if kvcalc.fit(MODEL, gpu=gpu, reserve="2GiB", tp=tp, **POINT).fits
        ]
        assert named.get(gpu) == min(fitting, default=None)
    memory = [one.memory_bytes for one in found]
    assert memory == sorted(memory)


def test_a_smaller_cache_needs_no_more():
    """With an fp8 cache no GPU is needed more often than with one of 16 bits."""
    found = plan(MODEL, reserve="2GiB", gpus=["rtx-4090", "h100-sxm-80gb"], **POINT)
    needed = {(one.gpu, one.kv_dtype): one.tp for one in found}
    assert needed["rtx-4090", "fp8"] <= needed["rtx-4090", "bf16"]
    assert needed["h100-sxm-80gb", "fp8"] <= needed["h100-sxm-80gb", "bf16"]


def test_a_plan_is_printed_and_is_data(capsys, monkeypatch):
    """A table at 80 columns, and one JSON object."""
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["plan", MODEL, "--seq", "8k", "--concurrency", "20", "--reserve", "2GiB"]
    arguments += ["--gpu", "rtx-4090,h100-sxm-80gb"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 × h100-sxm-80gb" in shown
    assert max(map(len, shown.splitlines()[:8])) <= 80
    assert cli.run([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "kvcalc.plan/1"
    assert {one["gpu"] for one in data["deployments"]} == {"rtx-4090", "h100-sxm-80gb"}
    assert all(one["fit"]["fits"] for one in data["deployments"])


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([MODEL, "--seq", "8k", "--concurrency", "100000"], 1, "no GPU"),
        (["google/gemma-3n-E4B-it"], 3, "weights"),
        ([MODEL, "--gpu", "t5"], 2, "unknown GPU"),
        ([MODEL, "--engine", "sglang"], 2, "mem_fraction_static"),
        ([MODEL, "--share", "2"], 2, "--share"),
    ],
)
def test_where_nothing_serves_the_reason_is_told(arguments, status, reason, capsys):
    """Too much for any machine is a failed check; what no machine could take is refused."""
    assert cli.run(["plan", *arguments, "--reserve", "2GiB"]) == status
    said = capsys.readouterr()
    assert reason in said.err
    assert said.out == ""
