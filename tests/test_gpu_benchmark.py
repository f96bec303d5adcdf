"""The benchmark for a GPU's nine minutes, in its tiny form: the same code on the CPU."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What it printed, and its rows."""
    out = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--out", out]
    run = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_every_part_ends(tiny):
    """Nothing fails or is skipped, and each part says what it took."""
    _, rows = tiny
    parts = [row["name"] for row in rows if row.get("part") == "part"]
    assert parts == [
        *("machine", "kernels", "attention", "8k", "32k", "128k"),
        *("machine", "offloaded", "offload"),
    ]
    assert not [row for row in rows if row.get("part") in ("failed", "skipped")]


def test_profiled_rows_hold_their_prediction(tiny):
    """Three lengths and the offloaded cache, each row with its expected step."""
    _, rows = tiny
    profiled = [row for row in rows if row["schema"] == "kvcalc.profile-row/1"]
    assert [row["strategy"] for row in profiled] == [
        *("dynamic", "static", "int4", "fp8", "snapkv"),
        *("dynamic", "static", "int4"),
        *("dynamic", "static", "int4"),
        *("offload", "offload"),
    ]
    for row in profiled:
        assert row["status"] == "ok", row["reason"]
        assert row["predicted_bytes"] == row["held_bytes"] > 0
        light = row["speed_of_light"]
        assert light["expected_tpot_seconds"] >= light["tpot_seconds"] > 0


def test_kernels_are_held_against_fp64(tiny):
    """In Triton's interpreter where there is no GPU."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed, the kernels are not interpreted")
    _, rows = tiny
    errors = {row["kernel"]: row["relative_error"] for row in rows if row.get("part") == "kernel"}
    assert errors.keys() == {"static", "int4"}
    assert 0 < max(errors.values()) < 1e-4


def test_the_last_table_says_what_was_met(tiny):
    """Goals of speed are open on a CPU, the others are met."""
    printed, _ = tiny
    table = printed[printed.rindex("\ngoal ") :].splitlines()[2:]
    verdicts = {line[:56].strip(): line[83:].strip() for line in table if line[83:].strip()}
    assert verdicts["predicted = held in every row"] == "yes"
    assert verdicts["a captured step answers as an eager one"] == "yes"
    assert verdicts["int4 TPOT ≤ 1.0× dynamic at 80"] == "-"
    assert "no" not in verdicts.values()


def test_the_plan_is_nine_minutes_at_most():
    """The parts' shares, and what they take on an H200 by its published figures."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--plan"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    name, given, _, guessed, _ = run.stdout.splitlines()[-1].split()
    assert name == "all"
    assert int(guessed) <= int(given) <= 9 * 60
