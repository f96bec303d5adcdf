"""What a person sees: whole screens at 80 columns, compared with literals."""

import json
import os
import subprocess
import sys

import pytest

from kvcalc import cli


@pytest.fixture
def screen(capsys, monkeypatch):
    """Run a command at 80 columns; returns what it printed, without trailing blanks."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        assert cli.run(list(arguments)) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return "\n".join(line.rstrip() for line in printed.out.splitlines())

    return run


def test_one_model_at_one_point(screen):
    """Total, growth with its break, layer groups, rule, source, fields and class rules."""
    assert (
        screen("size", "google/gemma-3-27b", "--seq", "128k")
        == """\
google/gemma-3-27b-it  131,072 tokens × batch 1, bf16

KV cache   10.406 GiB  11,173,625,856 bytes  (exact)
growth     507,904 bytes per token up to 1,024 tokens
           81,920 bytes per token + 436,207,616 bytes fixed beyond 1,024 tokens

Layers  Kind               Keeps for a token              B/token       Bytes
52      sliding_attention  16 KV heads × (128 K + 128 V)        0  416.00 MiB
10      full_attention     16 KV heads × (128 K + 128 V)   81,920  10.000 GiB

counts:   what the architecture must keep
rule:     full layers keep every token, window layers min(tokens, window) (arXiv:2310.06825)
config:   catalogue: GitHub sgl-project/ome/pkg/hfutil/modelconfig/testdata/gemma3.json\
@17b77edad2, 2026-11-22 (verbatim)
fields:   text_config.num_hidden_layers=62, text_config.num_attention_heads=32, \
text_config.num_key_value_heads=16, text_config.head_dim=128, text_config.sliding_window=1024
defaults: text_config.layer_types=1 full in 6 layers: class rule (Gemma3TextConfig, \
transformers 5.23.0)
defaults: text_config.max_position_embeddings=131072: class default (Gemma3TextConfig, \
transformers 5.23.0)
dtype:    bf16: config field torch_dtype
note: google/gemma-3-27b is published as google/gemma-3-27b-it"""
    )


def test_explain_shows_the_formula_with_numbers(screen):
    """`--explain` multiplies each layer group out, ranks and sequences included."""
    shown = screen("size", "gpt-oss-20b", "--seq", "8k", "--batch", "4", "--tp", "2", "--explain")
    assert (
        """\
12 × sliding_attention, layers 0, 2, 4, 6, 8, 10, …
  each 4 sequences × 2 ranks × 4 KV heads × (64 K + 64 V) × 2 B × min(8,192, window 128) tokens \
= 1,048,576 B
  12 × 1,048,576 B = 12,582,912 B
12 × full_attention, layers 1, 3, 5, 7, 9, 11, …
  each 4 sequences × 2 ranks × 4 KV heads × (64 K + 64 V) × 2 B × 8,192 tokens = 67,108,864 B
  12 × 67,108,864 B = 805,306,368 B"""
        in shown
    )
    assert "bf16: assumed: the config names no dtype; --kv-dtype sets it" in shown


def test_several_points_are_a_table(screen):
    """Models and dtypes side by side, what never differs said once, alignment kept."""
    assert screen(
        *("size", "llama-3-8b", "deepseek-v3", "--seq", "32k", "--kv-dtype", "bf16,fp8")
    ).splitlines()[:7] == [
        "KV cache: 32,768 tokens, batch 1",
        "",
        "Model                       Dtype   KV cache          Bytes  B/token",
        "meta-llama/Meta-Llama-3-8B  bf16   4.000 GiB  4,294,967,296  131,072",
        "meta-llama/Meta-Llama-3-8B  fp8    2.000 GiB  2,147,483,648   65,536",
        "deepseek-ai/DeepSeek-V3     bf16   2.145 GiB  2,302,672,896   70,272",
        "deepseek-ai/DeepSeek-V3     fp8    1.072 GiB  1,151,336,448   35,136",
    ]


def test_without_a_length_a_few_are_shown(screen):
    """Without --seq: the cost of a token and lengths up to the model's own maximum."""
    lines = screen("size", "Qwen/Qwen2-7B").splitlines()
    assert lines[2] == "growth     57,344 bytes per token"
    assert [line.split()[0] for line in lines[5:8]] == ["4,096", "32,768", "131,072"]
    assert "(max)" in lines[7]


def test_engine_transformers_reports_the_pinned_prompt_apart(screen):
    """What a long prefill keeps alive until the first decode step stands on its own line."""
    shown = screen("size", "mistral-7b", "--seq", "32k", "--engine", "transformers")
    assert "KV cache   512.00 MiB  536,870,912 bytes  (exact)" in shown
    assert "after prefill: 4.000 GiB  4,294,967,296 bytes" in shown


def test_markdown_and_csv(screen):
    """Both carry integers of bytes and one row for each point."""
    markdown = screen("size", "llama-3-8b", "--seq", "8k", "--markdown").splitlines()
    assert markdown[2] == (
        "| meta-llama/Meta-Llama-3-8B | 8,192 | 1 | bf16 | dynamic | model | 1 × 1 "
        "| 1.000 GiB | 1,073,741,824 | 1.000 GiB |"
    )
    header, row = screen("size", "llama-3-8b", "--seq", "8k", "--csv").splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert (values["total_bytes"], values["batch"]) == ("1073741824", "1")


def test_json_of_one_point_and_of_several(screen):
    """One point prints the report, several a table; both are what the library returns."""
    import kvcalc

    one = json.loads(screen("size", "llama-3-8b", "--seq", "128k", "--json"))
    assert one == kvcalc.size("llama-3-8b", seq="128k").to_dict()
    assert one["schema"] == "kvcalc.size/1"
    several = json.loads(screen("size", "llama-3-8b", "--seq", "8k,16k", "--json"))
    assert several["schema"] == "kvcalc.size-table/1"
    assert [report["seq_tokens"] for report in several["reports"]] == [8192, 16384]


def test_names_of_other_tools_are_taken(screen):
    """Option names that users know from vLLM and others mean the same here."""
    ours = screen("size", "llama-3-8b", "--seq", "8k", "--kv-dtype", "fp8", "--tp", "2", "--json")
    theirs = screen(
        *("size", "llama-3-8b", "--max-model-len=8192", "--kv-cache-dtype", "fp8"),
        *("--tensor-parallel-size", "2", "--json"),
    )
    assert ours == theirs


def test_an_ascii_terminal_gets_ascii():
    """Signs that an encoding lacks are spelt out instead of failing or turning into marks."""
    done = subprocess.run(
        [sys.executable, "-m", "kvcalc", "size", "llama-3-8b", "--seq", "8k", "--strategy", "int4"],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert b"8 KV heads x (128 K + 128 V), int4/32 + tail >= 128" in done.stdout


def test_strategies_are_listed(screen):
    """Each strategy with its parameters and defaults, and as JSON."""
    assert "int4:group=32,residual=128" in screen("strategies")
    listed = json.loads(screen("strategies", "--json"))["strategies"]
    assert {"dynamic", "static", "int4"} <= {one["name"] for one in listed}
    (one,) = json.loads(screen("strategies", "int4", "--json"))["strategies"]
    assert one["parameters"] == {"group": 32, "residual": 128}


def test_accelerators_are_listed(screen):
    """One line for each accelerator in whose id, name, vendor or architecture every word occurs."""
    assert (
        screen("gpus", "hopper", "h100")
        == """\
GPU             Architecture      Memory      Usable   GB/s  BF16 TFLOPS    W
h100-nvl-94gb   Hopper        94.000 GiB              3,940        835.0  400
h100-pcie-80gb  Hopper        80.000 GiB              2,000        756.5  350
h100-sxm-80gb   Hopper        80.000 GiB  79.647 GiB  3,350        989.4  700

3 accelerators matching 'hopper h100'; --json gives each figure's source and date"""
    )
    assert "0 accelerators" in screen("gpus", "abacus")


def test_accelerators_as_data(capsys):
    """`--json` gives each figure with source and date, and null where nothing vouches for it."""
    assert cli.run(["gpus", "h100-pcie", "--json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert gpu["bandwidth_bytes_per_second"]["value"] == 2_000_000_000_000
    assert gpu["bandwidth_bytes_per_second"]["source"]
    assert gpu["usable_bytes"] is None
