"""What a person sees: whole screens at 80 columns, compared with literals."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcalc import api, cli
from kvcalc.hardware import gpu_ids, load_gpu, named_gpu, read_gpu
from kvcalc.measure.row import mark_front
from kvcalc.render import measured
from kvcalc.sources import catalogue
from kvcalc.strategies import dynamic, strategy_names


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
    """Each strategy in a line or two, and which of them go together."""
    lines = screen("strategies").splitlines()
    for name in strategy_names():
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert len(lines) < 2.5 * len(strategy_names())
    assert f"{len(strategy_names())} strategies; kvcalc strategies NAME tells about one" in lines
    together = " ".join(lines).partition("A+B, where B stores what A keeps: A of ")[2]
    assert "snapkv" in together.partition("; B of ")[0].split(", ")
    assert "int4" in together.partition("; B of ")[2]


def test_one_strategy_is_told_about(screen):
    """What it keeps, the formula, when it evicts, its limits, and claims with their conditions."""
    assert (
        screen("strategies", "static")
        == """\
static
  allocated once at full length and written in place (prompt + generated tokens)
  keeps     what dynamic keeps, in storage for all tokens of prompt and answer
            from the start
  formula   dynamic at full length, and 8 bytes for each layer
  evicts    nothing but what falls out of the model's own windows
  needs     the final length beforehand
  works on  full-attention, window and latent layers and index keys; states are
            as they are
  limits    faster only where steps are compiled or replayed as a CUDA graph;
            without Triton attention goes over the whole length, filled or not
  source    transformers StaticCache
  claims    up to 4× faster: with torch.compile, less for larger models
            (transformers' guide to LLM inference)
              like for like with TPOT in a profile: compiled there; here a CUDA
              graph on GPUs, on CPUs neither

like for like is the quantity; model, device and length are the claim's own"""
    )
    shown = screen("strategies", "snapkv")
    assert shown.startswith("snapkv:budget=12.5%,window=32,kernel=7,pooling=max\n")
    assert "choices   pooling: max or avg" in shown
    assert "another quantity: throughput of a server" in screen("strategies", "paged")


def test_a_pair_is_told_about_one_after_the_other(screen):
    """`snapkv+int4`: which stores what the other keeps, then both."""
    lines = screen("strategies", "snapkv+int4").splitlines()
    assert lines[0] == "snapkv+int4  int4 stores what snapkv keeps"
    assert any(line.startswith("snapkv:budget=") for line in lines)
    assert "int4:group=32,residual=128" in lines


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *strategy_names()])
def test_what_is_told_fits_the_terminal(name, columns, screen, monkeypatch):
    """Every strategy tells all that About asks for, folded at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = screen("strategies", *filter(None, [name]))
    # The first line of one is its spec, to be copied.
    assert max(map(len, shown.splitlines()[bool(name) :])) <= columns
    if name:
        (row,) = api.list_strategies(name)
        for key in ("summary", "keeps", "formula", "evicts", "needs", "limits", "source"):
            assert row[key]
        for headline in row["headlines"]:
            assert headline["claim"]
            assert headline["measures"] in {"", "bytes", "peak", "ttft", "tpot"}
            assert headline["measures"] or headline["remark"], "another quantity, and which?"


def test_strategies_as_data(screen):
    """`--json` has all that is told, in types that JSON knows."""
    listed = json.loads(screen("strategies", "--json"))
    assert listed["schema"] == "kvcalc.strategies/1"
    assert [one["name"] for one in listed["strategies"]] == list(strategy_names())
    (one,) = json.loads(screen("strategies", "int4", "--json"))["strategies"]
    assert one["parameters"] == {"group": 32, "residual": 128}
    one, other = json.loads(screen("strategies", "snapkv+int4", "--json"))["strategies"]
    assert one["parameters"] == {"budget": "12.5%", "window": 32, "kernel": 7, "pooling": "max"}
    assert one["choices"] == {"pooling": ["max", "avg"]}
    assert (one["composes"], one["stores"]) == (True, False)
    assert (other["composes"], other["stores"]) == (False, True)
    assert set(one["headlines"][0]) == {"claim", "conditions", "measures", "remark"}


def timing(milliseconds, spread):
    """A timing as a row has it, of two runs."""
    return {
        "median": milliseconds / 1e3,
        "spread": spread / 1e3,
        "p90": milliseconds / 1e3,
        "runs": [milliseconds / 1e3] * 2,
    }


def profile_row(strategy, held=None, peak=0, kl=0.0, recall=(1.0, 1.0), ttft=0, tpot=0, **fields):
    """A row of a profile, over a baseline of 8 MiB, 16 MiB, 200 ms and 10 ms."""
    row = {
        "model": "built-in",
        "strategy": strategy,
        "parameters": {},
        "status": "ok",
        "reason": "",
        "held_bytes": held,
        "peak_bytes": peak,
        "ttft_seconds": timing(ttft, 4),
        "tpot_seconds": timing(tpot, 0.5),
        "tokens_per_second": 1e3 / tpot if tpot else None,
        "fidelity": {"kl_mean": kl, "top1_agreement": 1.0},
        "needle_recall": dict(zip(("query_aware", "question_unseen"), recall, strict=True)),
        "speed_of_light": None,
        "ratio_to_dynamic": None
        if held is None
        else {
            "held": held / 2**23,
            "peak": peak / 2**24,
            "ttft": ttft / 200,
            "ttft_alike": abs(ttft - 200) < 8,
            "tpot": tpot / 10,
            "tpot_alike": abs(tpot - 10) < 1,
        },
        "on_pareto_front": None,
        "headlines": [],
        "layers_share": False,
        "layers": [{}] * 4,
        "notes": [],
        "figures": {},
        "observed": {},
        "conditions": {
            "num_layers": 4,
            "weights": "wired",
            "dtype": "fp32",
            "prompt_tokens": 8192,
            "decode_tokens": 33,
            "batch": 1,
            "repeats": 2,
            "device": "cpu",
            "hardware": {"processor": "some processor", "cores": 64},
            "torch": "2.13",
            "transformers": "5.23",
            "load_average": 1,
        },
    }
    return row | fields


CLAIM = {"claim": "8× less", "conditions": "16k tokens", "measures": "bytes", "remark": "a ratio"}
OTHER = {"claim": "29× faster", "conditions": "a server", "measures": "", "remark": "throughput"}
FAITHFUL = {"claim": "no loss", "conditions": "one set", "measures": "", "remark": "a score"}
FASTER = {"claim": "2× faster", "conditions": "a GPU", "measures": "tpot", "remark": ""}


@pytest.fixture
def rows():
    """Rows of a profile of all strategies there are."""
    rows = [
        profile_row("refusing", status="refused", reason="refusing needs a window of 80 " * 5),
        profile_row("unable", status="refused", reason="no group fits"),
        profile_row("dynamic", 2**23, 2**24, ttft=200, tpot=10),
        profile_row(
            *("snapkv", 2**20, 3 * 2**22, 2e-3, (1.0, 0.25)),
            ttft=205,
            tpot=5,
            headlines=[CLAIM | {"measured": 0.125}, OTHER | {"measured": None}],
        ),
        profile_row(
            *("lava", 2**20, 3 * 2**22, 4e-3, (1.0, 0.25)),
            ttft=1234.5,
            tpot=10.5,
            layers_share=True,
            observed={"most_of_a_layer": 0.5, "tokens": 1024.0},
            headlines=[FAITHFUL | {"measured": None}, FASTER | {"measured": 1.05}],
        ),
        profile_row("none", 0, 2**22, ttft=200, tpot=300, figures={"traffic_bytes": 123456}),
        profile_row("broken", status="failed", reason="ValueError: something"),
    ]
    mark_front(rows)
    return rows


def test_a_profile_at_eighty_columns(rows, capsys, monkeypatch):
    """Ratios, needles, the front, proofs, what was refused, and claims beside what was measured."""
    monkeypatch.setenv("COLUMNS", "80")
    measured.print_profile(rows)
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert (
        shown
        == """\
built-in  4 layers, wired weights, fp32, 8,192 + 33 tokens × batch 1

Strategy       Held  vs dyn       Peak  vs dyn       KL  needle  unseen
dynamic *  8.00 MiB  1.000×  16.00 MiB   1.00×        0    100%    100%
snapkv *   1.00 MiB  0.125×  12.00 MiB   0.75×  2.0e-03    100%     25%
lava       1.00 MiB  0.125×  12.00 MiB   0.75×  4.0e-03    100%     25%
none            0 B  0.000×   4.00 MiB   0.25×        0    100%    100%

Strategy       TTFT ms  vs dyn       TPOT ms    p90  vs dyn  tok/s
dynamic *  200.0 ± 4.0  ≈1.00×  10.00 ± 0.50  10.00  ≈1.00×    100
snapkv *   205.0 ± 4.0  ≈1.02×   5.00 ± 0.50   5.00   0.50×    200
lava         1,234 ± 4   6.17×  10.50 ± 0.50  10.50  ≈1.05×     95
none       200.0 ± 4.0  ≈1.00×   300.0 ± 0.5  300.0  30.00×      3

* on the Pareto front of held bytes, KL and needle recall: no other row is as
  good in all of them and better in one (rows that hold nothing take no part)

dynamic: predicted = held = 8,388,608 bytes in all 4 layers
snapkv: predicted = held = 1,048,576 bytes in all 4 layers
lava: predicted = held = 1,048,576 bytes in all 4 layers together, not in each
  observed: most of a layer 0.5, tokens 1,024
none: predicted = held = 0 bytes in all 4 layers; traffic 123,456 bytes
broken: failed: ValueError: something
refused: refusing needs a window of 80 refusing needs a window of 80 refusing …
refused: unable: no group fits

headlines: what is claimed, and what was measured here
snapkv  8× less: 16k tokens
          bytes held here: 0.125× dynamic's, 8× less; a ratio
        29× faster: a server
          another quantity: throughput
lava    no loss: one set
          another quantity: a score
        2× faster: a GPU
          TPOT here: ≈1.050× dynamic's, 1.05× as much

cpu (some processor), torch 2.13, transformers 5.23; median of 2 runs ± interquartile range; peak \
above the weights"""
    )


def test_the_catalogue_fits_eighty_columns(screen):
    """Each model has its figures in one line, below its name where that is long; one that is
    refused has its type instead.
    """
    lines = screen("models").splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert [name for name in catalogue.names() if name not in words] == []
    assert lines[0].split() == ["Model", "Family", "Dtype", "Max", "tokens", "B/token"]
    assert (
        screen("models", "nemotron", "9b")
        == """\
Model                              Family        Dtype  Max tokens  B/token
nvidia/NVIDIA-Nemotron-Nano-9B-v2  mamba_hybrid  bf16      131,072   16,384

1 model matching 'nemotron 9b', 1 of them sized"""
    )
    folded = screen("models", "nvidia/llama").splitlines()
    assert folded[1] == "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF"
    assert folded[2].split() == ["full", "bf16", "327,680"]
    assert "pfnet/plamo-2-1b  refused: plamo2\n" in screen("models", "plamo2")
    assert screen("models", "zzz") == "0 models matching 'zzz', 0 of them sized"


def test_accelerators_are_listed(screen):
    """One line for each accelerator in whose id, name, vendor or architecture every word occurs."""
    assert (
        screen("gpus", "hopper", "h100")
        == """\
GPU             Architecture  GiB  Usable   GB/s   BF16    W
h100-nvl-94gb   Hopper         94   93.58  3,940    835  400
h100-pcie-80gb  Hopper         80   79.65  2,000  756.5  350
h100-sxm-80gb   Hopper         80   79.19  3,350  989.4  700

GiB: nominal; Usable: what a driver tells, from which fit and plan start; BF16:
dense TFLOPS
3 accelerators matching 'hopper h100'; --json gives each figure's source and date"""
    )
    assert "0 accelerators" in screen("gpus", "abacus")


def test_what_a_driver_tells_of_an_accelerator_is_shown_or_marked(screen):
    """The list shows the memory that `fit` starts from, whoever told it, has a dash where nobody
    did, and takes 80 columns.
    """
    lines = screen("gpus").splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0]: line for line in lines[1:102]}
    assert list(shown) == list(gpu_ids())
    for gpu in map(load_gpu, gpu_ids()):
        figure = gpu.total_bytes
        assert (f"  {figure.value / 2**30:.2f}  " if figure else "   -  ") in shown[gpu.id]
    assert "(-: not" in lines[103]
    assert " 44.40 " in shown["l40"]


def test_the_file_of_an_accelerator_is_printed_to_start_from(screen, capsys, tmp_path):
    """`--yaml` prints a file that reads as the same GPU once it says what a driver tells, and is
    of one GPU.
    """
    for gpu in map(load_gpu, gpu_ids()):
        text = screen("gpus", gpu.id, "--yaml")
        path = tmp_path / f"{gpu.id}.yaml"
        path.write_text(text, "utf-8")
        if gpu.total_bytes:
            assert named_gpu(str(path)) == gpu
        else:
            assert "\n# No driver's figure is known here: give usable_bytes or cuda_bytes\n" in text
            assert read_gpu(path) == gpu
    assert screen("gpus", "H100", "sxm", "--yaml") == screen("gpus", "h100-sxm-80gb", "--yaml")
    assert cli.run(["gpus", "h100", "--yaml"]) == 2
    assert "did you mean h100-nvl-94gb, h100-pcie-80gb or h100-sxm-80gb" in capsys.readouterr().err
    assert cli.run(["gpus", "--yaml"]) == 2
    assert "prints one GPU: kvcalc gpus l40s --yaml" in capsys.readouterr().err


def test_accelerators_as_data(capsys):
    """`--json` gives each figure with source and date, and null where nothing vouches for it."""
    assert cli.run(["gpus", "h200-nvl", "--json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert gpu["bandwidth_bytes_per_second"]["value"] == 4_800_000_000_000
    assert gpu["bandwidth_bytes_per_second"]["source"]
    assert gpu["usable_bytes"] is None


def test_a_profile_without_needles_shows_the_likeliest_token(rows, capsys):
    """Where no recall is measured its place is taken by the agreement of the likeliest tokens."""
    told = [row | {"needle_recall": None} for row in rows]
    measured.print_profile(told)
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[-1] == "top-1"
    assert shown[3].split()[-1] == "100%"
    assert not any("recall" in line for line in shown)


def test_one_refusal_is_told_in_full(rows, capsys):
    """A single strategy that was refused says all it has to say."""
    measured.print_profile(rows[:1])
    assert rows[0]["reason"] in capsys.readouterr().out


def test_a_strategy_measured_twice_is_named_by_what_differs(rows, capsys):
    """Only parameters that differ stand in a label; the very same strategy is numbered."""
    twice = [
        rows[3] | {"parameters": {"budget": budget, "window": 32}}
        for budget in ("25%", "50%", "50%")
    ]
    measured.print_profile([rows[2], *twice])
    shown = capsys.readouterr().out
    assert "snapkv:budget=25% " in shown
    assert "snapkv:budget=50% #2" in shown
    assert "window" not in shown


COSTS = st.tuples(
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    *[st.sampled_from([0.0, 0.5, 1.0])] * 2,
)


@given(st.lists(COSTS, min_size=1, max_size=8))
def test_the_pareto_front(costs):
    """No row on it is beaten, each row beside it is by one on it; empty if none takes part."""
    rows = [
        profile_row(f"s{place}", held, 1, kl, (1 - seen, 1 - unseen))
        for place, (held, kl, seen, unseen) in enumerate(costs)
    ]
    mark_front(rows)
    marks = {True: [], False: [], None: []}
    for row, cost in zip(rows, costs, strict=True):
        marks[row["on_pareto_front"]].append(cost)
    assert [cost for cost in costs if cost[0] == 0] == marks[None]

    def beats(one, other):
        return one != other and all(mine <= its for mine, its in zip(one, other, strict=True))

    taking_part = marks[True] + marks[False]
    assert marks[True] or not taking_part
    assert not any(beats(other, one) for one in marks[True] for other in taking_part)
    assert all(any(beats(other, one) for other in marks[True]) for one in marks[False])


def test_rows_that_say_nothing_of_answers_are_not_on_the_front():
    """Who was refused, broke its promise or answered nonsense takes no part."""
    rows = [
        profile_row("dynamic", 8, 1),
        profile_row("refusing", status="refused", fidelity=None),
        profile_row("mismatch", 1, 1, status="mismatch"),
        profile_row("nonsense", 1, 1, float("nan")),
        profile_row("silent", 1, 1, fidelity=None),
    ]
    mark_front(rows)
    assert [row["on_pareto_front"] for row in rows] == [True, None, None, None, None]


def profiled(capsys, *arguments):
    """The rows of a short profile of the built-in model."""
    settings = ["--seq", "200", "--decode", "2", "--repeats", "1", "--warmup", "0"]
    assert cli.run(["profile", "--device", "cpu", "--json", *settings, *arguments]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_rows_carry_claims_and_the_front(capsys):
    """Each claim stands in the row with the ratio that was measured; of a pair nothing is claimed,
    and without the baseline nothing is measured.
    """
    full, pair, one = profiled(capsys, "--strategy", "dynamic,snapkv:window=8+int4,snapkv:window=8")
    assert (full["headlines"], pair["headlines"]) == ([], [])
    memory, speed = one["headlines"]
    assert memory["measured"] == one["ratio_to_dynamic"]["held"]
    assert speed["measured"] == one["ratio_to_dynamic"]["tpot"]
    assert full["on_pareto_front"] is True
    assert (one["layers_share"], one["observed"]) == (False, {})
    (alone,) = profiled(capsys, "--strategy", "snapkv:window=8")
    assert [headline["measured"] for headline in alone["headlines"]] == [None, None]


def test_the_speed_of_light_reads_what_a_step_reads(capsys, monkeypatch):
    """A strategy that reads a part of what it stores is held against that part."""
    (stored,) = profiled(capsys, "--strategy", "dynamic")

    def figures(layers, parameters, **point):
        return {"traffic_bytes": 1000}

    monkeypatch.setattr(dynamic, "figures", figures, raising=False)
    (read,) = profiled(capsys, "--strategy", "dynamic")
    more = stored["speed_of_light"]["decode"]["num_bytes"]
    less = read["speed_of_light"]["decode"]["num_bytes"]
    assert more - less == stored["held_bytes"] - 1000
