"""Profiling: rows, their records on disk, and what happens when a strategy goes wrong."""

import json
import math
import os
import re

import pytest
import torch
import zoo
from tiny import build as build_tiny
from tiny import tiny_config

from kvcalc import cli
from kvcalc.errors import OutputError
from kvcalc.families import describe
from kvcalc.measure import models, profile
from kvcalc.measure.feeds import Feed
from kvcalc.measure.fidelity import fidelity
from kvcalc.measure.peak import peak_memory
from kvcalc.measure.record import RowFile
from kvcalc.measure.workload import Workload
from kvcalc.origin import Origin
from kvcalc.strategies import load_strategy, strategy_names
from kvcalc.strategies.static import cache as static_cache

SMALL_GROUPS = {
    "int8": "int8:group=8,residual=5",
    "int4": "int4:group=8,residual=5",
    "int2": "int2:group=8,residual=5",
    "quanto-int4": "quanto-int4:group=8,residual=8",
    "quanto-int2": "quanto-int2:group=8,residual=8",
    "hqq-int8": "hqq-int8:group=8,residual=8",
    "hqq-int4": "hqq-int4:group=8,residual=8",
    "hqq-int2": "hqq-int2:group=8,residual=8",
}
"""Parameters that let a strategy show what it does on a model of a few channels."""

SMALL = ["profile", "--seq", "200", "--decode", "3", "--repeats", "2", "--device", "cpu"]


def rows_of(capsys, *arguments):
    """Status and rows of a small profile."""
    status = cli.run([*SMALL, "--json", *arguments])
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "kvcalc.profile/1"
    return status, printed["rows"]


def test_predicted_is_held_for_each_strategy(capsys):
    """Three strategies on the built-in model: three rows, predicted = held in every layer."""
    status, rows = rows_of(capsys, "--strategy", "dynamic,static,int4")
    assert status == 0
    assert [row["strategy"] for row in rows] == ["dynamic", "static", "int4"]
    for row in rows:
        assert row["status"] == "ok"
        assert row["predicted_bytes"] == row["held_bytes"] > 0
        for layer in row["layers"]:
            assert layer["predicted_bytes"] == layer["held_bytes"]
        for timing in (row["ttft_seconds"], row["tpot_seconds"]):
            assert timing["min"] <= timing["median"] <= timing["max"]
            assert timing["spread"] >= 0
            assert len(timing["runs"]) == 2
        assert row["tpot_seconds"]["median"] <= row["tpot_seconds"]["p90"]
        assert row["prefill_peak_bytes"] > row["after_prefill_bytes"]
        assert row["decode_peak_bytes"] > row["held_bytes"]
        assert row["peak_bytes"] == max(row["prefill_peak_bytes"], row["decode_peak_bytes"])
        assert row["speed_of_light"]["bandwidth_fraction"] > 0
    exact = {"kl_mean": 0, "kl_max": 0, "top1_agreement": 1, "max_logit_difference": 0}
    assert rows[0]["fidelity"] == exact
    assert 0 < rows[2]["fidelity"]["kl_max"] < 0.1
    same = {"held": 1, "peak": 1, "ttft": 1, "tpot": 1, "ttft_alike": True, "tpot_alike": True}
    assert rows[0]["ratio_to_dynamic"] == same
    assert rows[2]["ratio_to_dynamic"]["held"] == rows[2]["held_bytes"] / rows[0]["held_bytes"] < 1


def test_conditions_are_recorded(capsys):
    """Each row says on what hardware, with which versions, commit, seed and load it ran."""
    _, (row,) = rows_of(capsys, "--strategy", "dynamic", "--seed", "7", "--batch", "2")
    conditions = row["conditions"]
    assert conditions["torch"] == torch.__version__
    assert conditions["hardware"]["processor"]
    assert conditions["hardware"]["cores"] == os.cpu_count()
    assert (conditions["seed"], conditions["batch"], conditions["prompt_tokens"]) == (7, 2, 200)
    assert {"kvcalc", "commit", "transformers", "time", "threads", "load_average"} <= set(
        conditions
    )


def test_a_window_model_says_what_its_prefill_pins(capsys, tmp_path):
    """A model with windows built from a config.json holds its windows, and pinned the prompt."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("gemma3_text", num_hidden_layers=7)))
    status, (row,) = rows_of(capsys, str(path), "--weights", "random", "--strategy", "dynamic")
    assert status == 0
    assert row["after_prefill_bytes"] > row["held_bytes"] == row["predicted_bytes"]
    assert row["logical_bytes"] < row["held_bytes"]


def test_a_slice_of_the_layers(capsys):
    """`--layers 1` of a catalogued model has the real shapes of one layer."""
    name = "HuggingFaceTB/SmolLM-135M"
    status, (row,) = rows_of(
        capsys, name, "--weights", "random", "--layers", "1", "--strategy", "dynamic"
    )
    assert status == 0
    assert row["conditions"]["num_layers"] == len(row["layers"]) == 1
    assert row["held_bytes"] == 203 * 2 * 3 * 64 * 2


def test_a_checkpoint_is_loaded_from_a_folder(capsys, tmp_path):
    """A folder that save_pretrained wrote is loaded with its weights and measured."""
    build_tiny(tiny_config("qwen3")).save_pretrained(tmp_path)
    status, (row,) = rows_of(capsys, str(tmp_path), "--strategy", "dynamic")
    assert (status, row["conditions"]["weights"]) == (0, "checkpoint")
    assert row["predicted_bytes"] == row["held_bytes"]


def test_rows_are_appended_as_json_lines(capsys, tmp_path):
    """`--out` holds one JSON object a line, appended to what was there."""
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        rows_of(capsys, "--strategy", "dynamic", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["schema"] == "kvcalc.profile-row/1" for row in rows)


def test_a_broken_prediction_is_a_failure(capsys, monkeypatch):
    """A cache that holds other bytes than promised is reported by layer, with exit status 1."""
    build = static_cache.build

    def too_long(config, *, capacity_tokens, parameters):
        return build(config, capacity_tokens=capacity_tokens + 1, parameters=parameters)

    monkeypatch.setattr(static_cache, "build", too_long)
    status, rows = rows_of(capsys, "--strategy", "dynamic,static")
    assert status == 1
    assert [row["status"] for row in rows] == ["ok", "mismatch"]
    assert "layer 0" in rows[1]["reason"]
    assert rows[1]["held_bytes"] > rows[1]["predicted_bytes"]


@pytest.mark.parametrize(
    ("error", "expected_status", "exit_status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", 1),
        (MemoryError(), "out_of_memory", 1),
        (RuntimeError("\"cdist\" not implemented for 'Float8_e4m3fn'"), "refused", 3),
        (NotImplementedError("Could not run 'aten::x' from the 'CUDA' backend"), "refused", 3),
        (ValueError("something else"), "failed", 70),
    ],
)
def test_one_strategy_going_wrong_keeps_the_others(
    capsys, monkeypatch, error, expected_status, exit_status
):
    """Out of memory or a failure in one strategy is a row of its own; the rest goes on."""

    def fail(config, *, capacity_tokens, parameters):
        raise error

    monkeypatch.setattr(static_cache, "build", fail)
    status, rows = rows_of(capsys, "--strategy", "static,dynamic")
    assert status == exit_status
    assert [row["status"] for row in rows] == ["ok", expected_status]
    assert rows[1]["reason"]


def test_a_model_that_runs_out_of_memory_gets_one_line(capsys, monkeypatch):
    """While it is built or first run: no bug, and what to do."""

    def fail(*arguments):
        msg = "CUDA out of memory"
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr(models, "feed", fail)
    assert cli.run(SMALL) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--layers N" in message


def test_a_strategy_that_does_not_apply_is_refused(capsys):
    """int4 with a group that no row divides into is refused with the reason; others run."""
    status, rows = rows_of(capsys, "--strategy", "int4:group=48,dynamic")
    assert status == 3
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "group" in rows[1]["reason"]
    status, rows = rows_of(capsys, "--strategy", "int4:group=48")
    assert status == 3


def test_ctrl_c_keeps_the_finished_rows(capsys, monkeypatch, tmp_path):
    """An interrupt while the second strategy is counted leaves the first printed and on disk,
    status 130, and `--resume` goes on from there.
    """

    def interrupt(config, *, capacity_tokens, parameters):
        raise KeyboardInterrupt

    monkeypatch.setattr(static_cache, "build", interrupt)
    out = tmp_path / "rows.jsonl"
    arguments = ["--json", "--strategy", "dynamic,static,int4", "--out", str(out)]
    status = cli.run([*SMALL, *arguments])
    printed = capsys.readouterr()
    assert status == 130
    (row,) = json.loads(printed.out)["rows"]
    assert (row["strategy"], row["status"]) == ("dynamic", "interrupted")
    assert row["held_bytes"] == row["predicted_bytes"]
    assert len(out.with_name("rows.jsonl.parts").read_text().splitlines()) == 1
    assert "0 of 3 strategies measured" in printed.err
    assert "interrupted" in printed.err
    monkeypatch.undo()
    status, rows = rows_of(capsys, "--strategy", "dynamic", "--out", str(out), "--resume")
    assert status == 0
    assert rows[0]["layers"] == row["layers"]
    assert not out.with_name("rows.jsonl.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--out", "/proc/nowhere/rows.jsonl"], 2, "choose another --out"),
        (["built-in:head_dim=wide"], 2, "its knobs"),
        (["built-in:num_layers=1"], 2, "cannot be wired"),
        (["built-in:num_heads=8,num_kv_heads=3"], 2, "no multiple"),
        (["--device", "cuda:99"], 2, "device"),
        (["--device", "toaster"], 2, "device"),
        (["--strategy", "int5"], 2, "unknown strategy"),
        (["--strategy", "int4:bits=3"], 2, "parameter"),
        (["--decode", "0"], 2, "--decode"),
        (["llama-3-8b", "--layers", "2"], 2, "--weights random"),
        (["--dtype", "int8"], 2, "--dtype"),
        (["llama-3-8b"], 2, "--weights random"),
        (["rwkv-5-world-3b", "--weights", "random"], 3, "rwkv5"),
        (["deepseek-vl2-tiny", "--weights", "random"], 3, "deciding fields: kv_lora_rank"),
        (["moonshotai/Kimi-K2-Instruct", "--weights", "random"], 3, "kimi_k2"),
        (["llama-3-8b", "--weights", "random", "--layers", "33"], 2, "from 1 to 32"),
        (["google/gemma-2b-it", "--weights", "random"], 2, "partial"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, status, words):
    """What cannot be measured says so in one line before anything is loaded."""
    assert cli.run(["profile", "--seq", "64", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert words in printed.err
    assert "in the catalogue" not in printed.err  # all of these names are


def test_a_mismatch_stays_one_when_timing_fails_after_it(capsys, monkeypatch):
    """A broken prediction is reported even when the strategy fails later on."""
    build = static_cache.build
    calls = []

    def too_long_then_fail(config, *, capacity_tokens, parameters):
        calls.append(capacity_tokens)
        if len(calls) > 1:
            msg = "later"
            raise ValueError(msg)
        return build(config, capacity_tokens=capacity_tokens + 1, parameters=parameters)

    monkeypatch.setattr(static_cache, "build", too_long_then_fail)
    status, (row,) = rows_of(capsys, "--strategy", "static")
    assert (status, row["status"]) == (1, "mismatch")
    assert "later" in row["reason"]


def test_a_checkpoint_with_weights_missing_is_refused(capsys, tmp_path):
    """A folder whose weights are not all there is not measured as if they were."""
    from safetensors.torch import load_file, save_file

    build_tiny(tiny_config("llama")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert cli.run(["profile", str(tmp_path)]) == 2
    assert "weights are missing" in capsys.readouterr().err
    path.write_bytes(b"not safetensors")
    assert cli.run(["profile", str(tmp_path)]) == 2
    assert "--weights random" in capsys.readouterr().err


def test_a_row_that_cannot_be_written_is_still_shown(capsys, monkeypatch, tmp_path):
    """A full disk costs no measured row: it is printed, and the status says what happened."""

    def full(self, row):
        msg = "cannot write: disk full"
        raise OutputError(msg)

    monkeypatch.setattr(RowFile, "append", full)
    out = tmp_path / "rows.jsonl"
    assert cli.run([*SMALL, "--json", "--strategy", "dynamic,static", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert [row["strategy"] for row in json.loads(printed.out)["rows"]] == ["dynamic"]
    assert "disk full" in printed.err


def test_a_full_disk_ends_the_profile(capsys, monkeypatch, tmp_path):
    """A part that cannot be written is no refusal of the strategy: the profile ends and says so."""

    def full(self, point, **part):
        msg = "cannot write: disk full"
        raise OutputError(msg)

    monkeypatch.setattr(RowFile, "append_part", full)
    arguments = ["--json", "--strategy", "dynamic,static", "--out", str(tmp_path / "rows.jsonl")]
    assert cli.run([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert (row["strategy"], row["status"]) == ("dynamic", "interrupted")
    assert "disk full" in printed.err


def test_no_file_is_left_where_nothing_was_measured(tmp_path):
    """A profile that fails before its first row leaves no empty file behind."""
    out = tmp_path / "rows.jsonl"
    assert cli.run(["profile", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert not out.exists()


def test_missing_packages_name_the_command_that_installs_them(capsys, monkeypatch):
    """Without torch, profile says which command installs it."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.run(SMALL) == 2
    assert "pip install 'kvcalc[profile]'" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch, capsys):
    """A model larger than the free memory is refused with its size and the way out."""
    monkeypatch.setattr(models, "free_memory", lambda device: 2**20)
    arguments = ["llama-3-8b", "--weights", "random"]
    assert cli.run([*SMALL, *arguments]) == 2
    assert "--layers N" in capsys.readouterr().err
    monkeypatch.setattr(models, "free_memory", lambda device: 2**26)
    arguments = ["SmolLM-135M", "--weights", "random", "--layers", "1", "--batch", "900"]
    assert cli.run([*SMALL, *arguments]) == 2
    complaint = capsys.readouterr().err
    assert "a cache of" in complaint
    assert "--force" in complaint


def test_the_cpu_peak_is_the_same_in_every_run():
    """The traced peak of the same work is one number, and at least its largest tensor."""

    def work():
        with peak_memory(torch.device("cpu")) as peak:
            kept = torch.zeros(1000, 1000)
            (kept + 1).sum()
        return peak.num_bytes

    first = work()
    assert first == work()
    assert 2 * 4_000_000 <= first < 3 * 4_000_000


KEEPING = [name for name in strategy_names() if not load_strategy(name).compresses]
"""Strategies that keep every token; test_evicting has all the others on more models."""


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("name", KEEPING)
def test_every_strategy_promises_what_it_holds(model_type, name, tmp_path):
    """Over all that keep every token: predicted = held on full, window and latent models."""
    path = tmp_path / "config.json"
    widths = {} if model_type == "deepseek_v3" else {"head_dim": 16}
    path.write_text(json.dumps(tiny_config(model_type, **widths)))
    loaded = models.load_model(
        str(path),
        weights="random",
        num_layers=None,
        dtype="fp32",
        device=torch.device("cpu"),
        seed=0,
        revision=None,
    )
    chosen = load_strategy(SMALL_GROUPS.get(name, name))
    for prompt in (4, 40):
        (row,) = profile.profile(loaded, [chosen], Workload(prompt, 3, 2, 1, 0, 0))
        if row["status"] == "refused":  # no library, or no window
            pytest.skip(row["reason"])
        assert row["status"] == "ok", row["reason"]


TEN = [
    "deepseek_v3",
    "deepseek_v32",
    "falcon_h1",
    "gemma3_text",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama4_text",
    "mistral",
    "qwen3_next",
]
WELL = {"ok", "refused"}
EXACT = {"dynamic", "sliding", "offload", "paged"}
"""Strategies that change nothing in what attention sees."""
NATIVE = [name for name in KEEPING if not name.startswith(("quanto", "hqq"))]
EVICTING = [f"{name}:budget=12,window=4,kernel=3" for name in ("snapkv", "ada-kv", "lava")]
"""On more architectures than test_evicting has: hybrids with recurrent states among them."""


@pytest.mark.parametrize("model_type", TEN)
def test_hard_architectures_run_or_are_refused(model_type):
    """Windows, latents, recurrent states and hybrids: each native strategy holds what it predicts,
    or says why it does not apply; most do.
    """
    case = next(iter(zoo.cases("causal", model_type)))
    architecture = describe(case.config)
    loaded = models.LoadedModel(
        name=model_type,
        model=zoo.build(case, torch.float32),
        architecture=architecture,
        origin=Origin(requested=model_type, resolved=model_type, kind="mapping", detail="zoo"),
        weights="random",
        dtype="fp32",
        device=torch.device("cpu"),
    )
    chosen = [load_strategy(SMALL_GROUPS.get(name, name)) for name in (*NATIVE, *EVICTING)]
    rows = list(profile.profile(loaded, chosen, Workload(40, 2, 1, 1, 0, 0)))
    wrong = {row["strategy"]: row["reason"] for row in rows if row["status"] not in WELL}
    assert wrong == {}
    refused = {row["strategy"]: row["reason"] for row in rows if row["status"] == "refused"}
    assert len(refused.keys() & set(NATIVE)) <= 4
    assert all(refused.values())
    for row in rows:
        if row["status"] == "ok" and row["strategy"] in EXACT:
            assert row["fidelity"]["max_logit_difference"] < 1e-4, row["strategy"]


def test_the_built_in_model_finds_its_needle(capsys):
    """With the full cache, packed to 4 bits or paged the built-in model answers every question,
    seen in the prompt or not.
    """
    status, rows = rows_of(capsys, "--strategy", "dynamic,int4,paged", "--batch", "4")
    assert status == 0
    for row in rows:
        assert row["needle_recall"] == {"query_aware": 1, "question_unseen": 1}
    _, (shallow,) = rows_of(capsys, "--strategy", "dynamic", "--depth", "0.1")
    assert shallow["needle_recall"]["query_aware"] == 1
    knobs = "built-in:num_layers=3,num_heads=6,num_kv_heads=1,head_dim=32,diffuse=1"
    _, (other,) = rows_of(capsys, knobs, "--strategy", "dynamic")
    assert other["held_bytes"] == 203 * 3 * 1 * 2 * 32 * 4
    assert other["needle_recall"] == {"query_aware": 1, "question_unseen": 1}


def checkpoint_with_tokenizer(folder):
    """A tiny Llama and a tokenizer of fifty words, as save_pretrained writes them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    build_tiny(tiny_config("llama", head_dim=16)).save_pretrained(folder)
    words = {f"w{number}": number for number in range(50)}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_perplexity_of_a_text(capsys, tmp_path):
    """`--text` feeds a text in the model's own tokens: perplexity, and its ratio to the full
    cache's, which a strategy that changes nothing leaves at 1.
    """
    checkpoint_with_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 50}" for number in range(500)))
    arguments = [
        str(tmp_path),
        "--text",
        str(text),
        "--strategy",
        "dynamic,paged,int2:group=8,residual=5",
    ]
    status, rows = rows_of(capsys, *arguments)
    assert status == 0
    for row in rows[:2]:
        assert row["fidelity"]["perplexity"] > 1
        assert row["fidelity"]["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
        assert row["fidelity"]["perplexity_alike"]
    low, high = rows[2]["fidelity"]["perplexity_interval"]
    assert low < rows[2]["fidelity"]["perplexity"] < high
    assert rows[2]["fidelity"]["perplexity_ratio"] != 1
    assert cli.run([*SMALL, *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"perplexity \S+ \(95 %: \S+ to \S+\), 1× the full cache's \(1 to 1, no", printed
    )
    text.write_text("w1 w2 w3")
    assert cli.run([*SMALL, *arguments]) == 2
    assert "3 tokens" in capsys.readouterr().err
    assert cli.run([*SMALL, "--text", str(text)]) == 2
    assert "tokenizer" in capsys.readouterr().err
    text.unlink()
    assert cli.run([*SMALL, *arguments]) == 2
    assert "cannot read the text" in capsys.readouterr().err


def test_a_perplexity_has_an_interval():
    """Of few tokens it is wide, and a ratio whose interval holds 1 is no difference; of many that
    all differ alike it is one.
    """
    generator = torch.Generator().manual_seed(0)

    def told(steps, shift):
        full = torch.randn(steps + 1, 1, 8, generator=generator)
        targets = torch.randint(8, (1, steps), generator=generator)
        ours = full + shift * torch.nn.functional.one_hot(
            torch.cat([targets, targets[:, :1]], dim=1).T, 8
        ) * torch.rand(steps + 1, 1, 1, generator=generator)
        feed = Feed(targets, tuple(targets.split(1, dim=1)), is_text=True)
        return fidelity(ours, full, feed)

    worse = told(400, -0.5)
    assert worse["perplexity_ratio_interval"][0] > 1
    assert not worse["perplexity_alike"]
    same = told(20, 0.0)
    assert same["perplexity_alike"]
    (low, high), (lowest, highest) = (
        found["perplexity_interval"] for found in (worse, told(20, -0.5))
    )
    assert math.log(high / low) < math.log(highest / lowest) / 2
    assert told(1, -0.5)["perplexity_interval"] is None
