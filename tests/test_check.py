"""`kvcalc check`: strict YAML, requirements, and what CI systems are told."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcalc
from kvcalc import api, checking, cli, strict_yaml
from kvcalc.errors import InputError, KvcalcError
from kvcalc.render import checked
from kvcalc.sources import catalogue
from kvcalc.units import GIB

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "profiles" / "checks" / "serving.yaml"
README = (ROOT / "README.md").read_text("utf-8")

GOOD = """\
defaults:
  kv_memory: 20GiB
  require: [fits, headroom >= 10%]
deployments:
  chat:
    model: meta-llama/Meta-Llama-3-8B
    workload: {sequence: 8k, concurrency: 8}
"""


def checked_text(folder, text, *, name="kvcalc.yaml", baseline=None):
    """Check `text` as a file of this name."""
    path = folder / name
    path.write_text(text, "utf-8")
    return checking.check([path], baseline=baseline)


def one(folder, text):
    """The only deployment's result."""
    report = checked_text(folder, text)
    assert report.errors == ()
    (result,) = report.results
    return result


def test_figures_are_those_of_fit_and_size(tmp_path):
    """What is held against a requirement is what the library says of the same deployment."""
    figures = one(tmp_path, GOOD).figures
    fit = kvcalc.fit("meta-llama/Meta-Llama-3-8B", kv_memory="20GiB", seq="8k", concurrency=8)
    assert figures["needed"] == fit.needed_bytes == 8 * GIB
    assert figures["headroom"] == fit.headroom_bytes
    assert (figures["max_concurrency"], figures["max_tokens"]) == (19, fit.max_tokens)
    assert figures["kv_bytes_per_token"] == 128 * 1024


@pytest.mark.parametrize(
    ("requirement", "holds"),
    [
        ("fits", True),
        ("headroom >= 60%", True),
        ("headroom > 60%", False),
        ("headroom >= 60.000001%", False),
        ("headroom == 12GiB", True),
        ("headroom >= 12.1 GiB", False),
        ("max_concurrency >= 19", True),
        ("max_concurrency>=20", False),
        ("max_tokens <= 20k", True),
        ("kv_bytes_per_token <= 128 KiB", True),
        ("kv_bytes_per_token < 128 KiB", False),
        ("kv_bytes_per_token <= 131 KB", False),
        ("needed <= 8GiB", True),
        ("kv_memory >= 20 GB", True),
    ],
)
def test_requirements_compare_exact_figures(requirement, holds, tmp_path):
    """Bounds are bytes, counts and parts; the last byte decides."""
    result = one(tmp_path, GOOD.replace("headroom >= 10%", requirement))
    outcome = result.outcomes[-1]
    assert outcome.requirement.text == requirement
    assert (outcome.holds, result.status) == (holds, "holds" if holds else "fails")


def test_weights_are_known_or_refused(tmp_path, monkeypatch):
    """A requirement on weights holds the report's figure, and is refused where there is none."""
    text = GOOD.replace("fits", "weights <= 20 GiB")
    fit = api.fit

    class Weighed:
        def __init__(self, report, weights):
            self.report, self.weights_bytes = report, weights

        def __getattr__(self, name):
            return getattr(self.report, name)

    for weights, status in ((20 * GIB, "holds"), (20 * GIB + 1, "fails"), (None, "refused")):
        monkeypatch.setattr(api, "fit", lambda *a, w=weights, **b: Weighed(fit(*a, **b), w))
        result = one(tmp_path, text)
        assert result.status == status
    assert "weights <= 20 GiB" in str(result.error)


def test_defaults_merge_and_the_nearest_word_wins(tmp_path):
    """A deployment goes before what it merges, and that before the defaults; a requirement replaces
    those of its figure, a workload's keys are taken one by one.
    """
    text = """\
x-fast: &fast {gpu: h100-sxm-80gb, reserve: 3GiB, workload: {sequence: 4k}}
defaults:
  kv_memory: 20GiB
  tp: 4
  workload: {concurrency: 3, sequence: 1k}
  require: [fits, max_concurrency >= 5, max_tokens >= 2k]
deployments:
  a: {<<: *fast, kv_memory: 30GiB, model: m, count: 2, require: max_concurrency >= 9}
  b: {<<: *fast, model: m, workload: {sequence: 2k}}
"""
    path = tmp_path / "kvcalc.yaml"
    path.write_text(text, "utf-8")
    first, second = checking.read_checks(path)
    assert first.given == {"kv_memory": 30 * GIB, "tp": 2, "concurrency": 3, "seq": 4096}
    assert second.given == {
        "gpu": "h100-sxm-80gb",
        "reserve": 3 * GIB,
        "tp": 4,
        "concurrency": 3,
        "seq": 2048,
    }
    assert [said.text for said in first.requirements] == [
        "fits",
        "max_concurrency >= 9",
        "max_tokens >= 2k",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("  kv_memory: 20GiB", "  kv_memory: 20GiB\n  kv_memory: 1GiB", 3, "duplicate key"),
        ("20GiB", "20", 2, "has no unit"),
        ("20GiB", "20 parsecs", 2, "defaults.kv_memory"),
        ("headroom >= 10%", "headroom >= 10", 3, "has no unit"),
        ("headroom >= 10%", "headroom", 3, "write headroom >= 10%"),
        ("headroom >= 10%", "fits >= 1", 3, "write fits"),
        ("headroom >= 10%", "max_concurrency >= 3 GiB", 3, "defaults.require[1]"),
        ("headroom >= 10%", "weights <= 10%", 3, "a number of bytes"),
        ("headroom >= 10%", "headrom >= 10%", 3, "did you mean headroom?"),
        ("    model: meta-llama/Meta-Llama-3-8B\n", "", 5, "missing key 'model'"),
        ("    model:", "    modle:", 6, "did you mean model?"),
        ("sequence: 8k", "sequence: 010", 7, "deployments.chat.workload.sequence"),
        ("sequence: 8k", "seq: 8k", 7, "did you mean sequence?"),
        ("concurrency: 8", "concurrency: -1", 7, "concurrency"),
        ("concurrency: 8", "prefix_share: 100%", 7, "under 100%"),
        ("concurrency: 8", "concurrency: [8]", 7, "not a list"),
        ("concurrency: 8", "concurrency: null", 7, "not empty"),
        ("    model:", "\tmodel:", 6, "a tab"),
        ("    model:", "    engine: nccl\n    model:", 6, "unknown engine"),
        ("    model:", "    options: {blok: 1}\n    model:", 6, "options.blok: engine vllm has no"),
        ("    model:", "    gpu: h100\n    reserve: 1GiB\n    model:", 6, "did you mean h100-"),
        ("    model:", "    kv_dtype: fp9\n    model:", 6, "deployments.chat.kv_dtype"),
        ("    model:", "    tp: two\n    model:", 6, "whole number"),
        ("    model:", "    count: 3\n    pp: 2\n    model:", 6, "3 GPUs"),
        ("    model:", "    gpu: a10\n    kv_memory: 1GiB\n    model:", 7, "one of the two"),
        ("    model:", "    share: 90\n    model:", 6, "such as 0.9"),
        ("20GiB", "!!python/object/apply:os.system [exit]", 2, "defaults.kv_memory: a tag"),
        ("20GiB", "!!int 20", 2, "a tag"),
        ("20GiB", "*nobody", 2, "no anchor"),
        ("20GiB", "20GiB\n  model: a: b", 3, "not YAML"),
        ("20GiB", "\x07", 2, "control character"),
        ("  require: [fits, headroom >= 10%]\n", "", 4, "nothing is required"),
        ("deployments:", "---\ndeployments:", 4, "second document"),
        ("deployments:", "depolyments:", 4, "did you mean deployments?"),
        (GOOD, "", 1, "the file is empty"),
        (GOOD, "- a", 1, "must be keys and values"),
        (GOOD, "deployments: {}", 1, "there are none"),
        (GOOD, "a: &a [*a]", 1, "still open"),
        (GOOD, "a: " + "[" * 30 + "]" * 30, 1, "nested deeper"),
        (GOOD, "[" * 200_000, 1, "nest"),
        (GOOD, "? [a]\n: b", 1, "a key must be text"),
    ],
)
def test_a_bad_file_gets_its_line_and_key(old, new, line, said, tmp_path):
    """Each slip is told with the line it stands in, the keys above it, and the status 2."""
    assert old in GOOD
    report = checked_text(tmp_path, GOOD.replace(old, new, 1))
    ((place, error),) = report.errors
    assert report.exit_code == 2
    assert place.line == line
    assert str(error).startswith(f"{tmp_path / 'kvcalc.yaml'}:{line}: ")
    assert said in str(error)
    assert "\n" not in str(error)


def bomb(entry):
    """Nine times nine times …: aliases of aliases."""
    names = "abcdefghij"
    lines = ["a: &a {x: 1}"]
    for name, last in zip(names[1:], names, strict=False):
        lines.append(f"{name}: &{name} {entry(','.join([f'*{last}'] * 9))}")
    return "\n".join(lines)


@pytest.mark.parametrize("entry", [lambda a: f"[{a}]", lambda a: f"{{<<: [{a}]}}"])
def test_a_bomb_is_refused_while_it_is_read(entry, tmp_path):
    """Aliases may not stand for more values than a file could hold."""
    report = checked_text(tmp_path, bomb(entry))
    ((place, error),) = report.errors
    assert place.line == 6
    assert "aliases stand for more than 100,000 values" in str(error)


def test_a_large_file_is_not_read(tmp_path):
    """Of 10 MB only the first MiB is read; what is no text has its line, too."""
    report = checked_text(tmp_path, GOOD + "# x\n" * 2_500_000)
    ((place, error),) = report.errors
    assert "larger than 1,048,576 bytes" in str(error)
    assert place.line > 1
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"a: 1\n\xff\xfe")
    with pytest.raises(InputError, match=r":2: not text in UTF-8"):
        strict_yaml.read(path)
    assert cli.run(["check", str(tmp_path / "none.yaml")]) == 2


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-&*<>[]{}!|'\"#%@,? \n\t0"), max_size=40))
def test_any_text_is_read_or_refused(text):
    """Nothing but an InputError comes out of a reader, and plain YAML means what PyYAML reads."""
    try:
        _, node = strict_yaml.parse(text, file="f")
    except InputError:
        return
    yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert node.line >= 1


def test_words_stay_what_was_written():
    """`no`, `1:30`, `010` and `1_000` do not turn into something else."""
    _, node = strict_yaml.parse("a: [no, 1:30, 010, 1_000, 1e3, 'null']", file="f")
    assert [item.text for item in node.all["a"][1].items] == [
        "no",
        "1:30",
        "010",
        "1_000",
        "1e3",
        "null",
    ]


@pytest.mark.parametrize(
    ("model", "status", "code", "said"),
    [
        ("no/such-model-anywhere", "bad", 2, "deployments.chat.model"),
        ("./missing.json", "bad", 2, "no file or folder"),
        ("google-t5/t5-small", "refused", 3, "vLLM"),
    ],
)
def test_a_model_that_is_bad_or_refused(model, status, code, said, tmp_path, capsys):
    """The others are still checked; the line of the model is named."""
    other = "  other:\n    model: llama-3.1-8b\n    workload: {sequence: 1k}\n"
    path = tmp_path / "kvcalc.yaml"
    path.write_text(GOOD.replace("meta-llama/Meta-Llama-3-8B", model) + other, "utf-8")
    assert cli.run(["check", str(path)]) == code
    printed = capsys.readouterr()
    assert f"{path}:6: deployments.chat.model: " in printed.err
    assert said in printed.err
    assert re.search(rf"^chat +{status} ", printed.out, re.MULTILINE)
    assert re.search(r"^other +holds ", printed.out, re.MULTILINE)


def test_vendored_configs_lie_beside_the_file(tmp_path, monkeypatch):
    """A path counts from the file, wherever the command runs, and a model is read once."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = ["./configs/config.json", "configs", "configs/config.json", "./configs/config.json"]
    text = GOOD[: GOOD.index("  chat:")] + "".join(
        f"  d{index}: {{model: {name}, workload: {{sequence: {1024 + index}}}}}\n"
        for index, name in enumerate(names)
    )
    monkeypatch.chdir("/")
    read = []
    resolve = api.sources.resolve

    def noting(model, **given):
        read.append(model)
        return resolve(model, **given)

    monkeypatch.setattr(api.sources, "resolve", noting)
    report = checked_text(tmp_path, text)
    assert [result.status for result in report.results] == ["holds"] * 4
    assert len(read) == 2


@pytest.mark.parametrize("share", ["25%", "50%", "99.9%"])
def test_a_shared_prefix_is_counted_once(share, tmp_path):
    """C sequences of S tokens take C times their blocks, less C - 1 times the prefix's whole ones;
    the most that fit beside the block that is never used do, and one more does not.
    """
    text = GOOD.replace("concurrency: 8", f"concurrency: 30, prefix_share: {share}")
    result = one(tmp_path, text)
    figures = result.figures
    block = 16 * 128 * 1024
    prefix = int(8192 * Fraction(share.rstrip("%")) / 100) // 16

    def needed(requests):
        return block * (requests * 8192 // 16 - (requests - 1) * prefix)

    assert figures["needed"] == needed(30)
    most = figures["max_concurrency"]
    assert needed(most) <= 20 * GIB - block < needed(most + 1)


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("meta-llama/Meta-Llama-3-8B", "google/gemma-3-27b-it"),
        GOOD.replace("    model:", "    engine: llama.cpp\n    model:"),
        GOOD.replace("    model:", "    engine: sglang\n    model:"),
        GOOD.replace("    model:", "    options: {enable_prefix_caching: no}\n    model:"),
        GOOD.replace("    model:", "    options: {num_speculative_tokens: 2}\n    model:"),
        GOOD.replace("headroom >= 10%", "max_tokens >= 1k"),
    ],
)
def test_a_shared_prefix_is_refused_where_it_is_not_exact(text, tmp_path):
    """Windows, other engines, prefix caching off, and the longest sequence."""
    result = one(tmp_path, text.replace("concurrency: 8", "concurrency: 2, prefix_share: 50%"))
    assert result.status == "refused"
    assert result.error.exit_code == 3


CHANGED = """\
defaults: {kv_memory: 9GiB, workload: {sequence: 8k}}
deployments:
  "chat, 100%":
    model: meta-llama/Meta-Llama-3-8B
    workload: {concurrency: 4}
    require:
      - max_concurrency >= 9
      - kv_bytes_per_token <= 128 KiB
  <b>|x|:
    model: reformer/no
    require: fits
"""


def test_what_github_is_told(tmp_path, monkeypatch):
    """Annotations escape what GitHub reads, and the summary what Markdown reads."""
    monkeypatch.chdir(tmp_path)
    Path("a,b.yaml").write_text(CHANGED.replace("9GiB", "8GiB"), "utf-8")
    report = checking.check([Path("a,b.yaml")])
    first, second = checked.annotations(report)
    assert first == (
        "::error file=a%2Cb.yaml,line=7,title=kvcalc check%3A chat%2C 100%25"
        "::max_concurrency >= 9 does not hold: 7"
    )
    assert second.startswith("::error file=a%2Cb.yaml,line=10,title=kvcalc check%3A <b>|x|::")
    lines = checked.step_summary(report).splitlines()
    assert lines[0] == "### kvcalc check: 2 deployments: 1 fails, 1 is bad"
    assert "| chat, 100% | fails | 4.000 GiB | 8.000 GiB | 50.0% | 7 | 128.00 KiB |" in lines
    assert "| &lt;b>\\|x\\| | bad | - | - | - | - | - |" in lines
    assert "- **chat, 100%**: `max_concurrency >= 9` does not hold: 7" in lines


def test_junit_is_xml_that_says_the_same(tmp_path):
    """A case for each requirement, failures and errors counted, whatever stands in a name."""
    report = checked_text(tmp_path, CHANGED.replace("9GiB", "8GiB"))
    suite = ET.fromstring(checked.junit_xml(report)).find("testsuite")  # noqa: S314 - our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    cases = [(case.get("classname"), case.get("name"), len(case)) for case in suite]
    assert cases == [
        ("chat, 100%", "max_concurrency >= 9", 1),
        ("chat, 100%", "kv_bytes_per_token <= 128 KiB", 0),
        ("<b>|x|", "figures", 1),
    ]
    assert suite[0][0].get("message") == "max_concurrency >= 9 does not hold: 7"
    bad = checked_text(tmp_path, "a: 1")
    suite = ET.fromstring(checked.junit_xml(bad)).find("testsuite")  # noqa: S314 - our own
    assert suite.get("errors") == "1"


def test_a_baseline_shows_what_a_change_did(tmp_path, capsys):
    """Every figure that differs is told from the old one; new and gone deployments, too."""
    path, old = tmp_path / "kvcalc.yaml", tmp_path / "old.json"
    path.write_text(GOOD.replace("model:", "kv_dtype: fp8\n    model:"), "utf-8")
    assert cli.run(["check", str(path), "--json"]) == 0
    old.write_text(capsys.readouterr().out)
    assert cli.run(["check", str(path), "--baseline", str(old)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    path.write_text(GOOD + "  more:\n    model: llama-3.1-8b\n    workload: {sequence: 1k}\n")
    assert cli.run(["check", str(path), "--baseline", str(old)]) == 0
    said = capsys.readouterr().out
    assert (
        "chat: KV per token 64 → 128 KiB, max concurrency 39 → 19, headroom 16 → 12 GiB, "
        "longest sequence 40,944 → 20,464, needed 4 → 8 GiB\nmore: new\n"
    ) in said
    path.write_text(GOOD.replace("chat", "other").replace("8k", "no"), "utf-8")
    assert cli.run(["check", str(path), "--baseline", str(old), "--json"]) == 2
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert [(one["name"], one["said"]) for one in changes] == [("chat", "gone")]
    for text in ("{}", "[", '{"schema": "kvcalc.check/1", "deployments": [{}]}', "[" * 10**5):
        old.write_text(text)
        assert cli.run(["check", str(path), "--baseline", str(old)]) == 2
        assert "is not what kvcalc check --json prints" in capsys.readouterr().err


def test_pairs_never_look_equal():
    """Figures that round to the same are told to the byte; a missing one is a dash."""
    assert checked._pair("bytes", 2**30, 2**30 + 1) == "1,073,741,824 → 1,073,741,825 B"
    assert checked._pair("bytes", 512, 2**20) == "512 B → 1 MiB"
    assert checked._pair("count", None, 4096) == "- → 4,096"
    assert checked._pair("flag", True, False) == "yes → no"
    assert checked._percent(Fraction(-1, 3)) == "-33.4%"
    assert checked._percent(Fraction(999_999, 10**7)) == "9.9%"


def test_json_and_files(tmp_path, capsys):
    """`--json` and `--out` hold the same, whole bytes; a folder that is not there is status 2."""
    path, out = tmp_path / "kvcalc.yaml", tmp_path / "out.json"
    path.write_text(GOOD, "utf-8")
    junit = tmp_path / "junit.xml"
    arguments = ["check", str(path), "--json", "--out", str(out), "--junit", str(junit)]
    assert cli.run(arguments) == 0
    printed = capsys.readouterr()
    assert out.read_text() == printed.out
    report = json.loads(printed.out)
    assert (report["schema"], report["exit_code"]) == ("kvcalc.check/1", 0)
    (deployment,) = report["deployments"]
    assert deployment["figures"]["needed"] == 8 * GIB
    assert deployment["line"] == 5
    assert ET.parse(junit).getroot().tag == "testsuites"  # noqa: S314 - our own
    assert cli.run(["check", str(path), "--out", str(tmp_path / "no" / "x")]) == 2


@pytest.mark.parametrize("option", ["--out", "--junit"])
@pytest.mark.parametrize("link", ["hard", "symbolic", "none"])
@pytest.mark.parametrize("read", ["kvcalc.yaml", "model.json", "folder/config.json", "gpu.yaml"])
def test_no_file_that_is_read_is_written_over(option, link, read, tmp_path, monkeypatch, capsys):
    """A report never takes the place of a file that is checked, or that it names, by no link."""
    monkeypatch.chdir(tmp_path)
    config = json.dumps(dict(catalogue.find("meta-llama/Meta-Llama-3-8B").config))
    Path("model.json").write_text(config)
    Path("folder").mkdir()
    Path("folder/config.json").write_text(config)
    Path("gpu.yaml").write_text("name: Mine\ncuda_bytes: 47.5GiB\n")
    Path("kvcalc.yaml").write_text(
        "deployments:\n"
        "  a: {model: model.json, kv_memory: 30GiB, require: [fits]}\n"
        "  b: {model: folder, kv_memory: 30GiB, require: [fits]}\n"
        "  c: {model: model.json, gpu: gpu.yaml, reserve: 3GiB, require: [fits]}\n"
    )
    before = Path(read).read_bytes()
    target = Path(read) if link == "none" else Path("link")
    if link == "hard":
        target.hardlink_to(read)
    elif link == "symbolic":
        target.symlink_to(read)
    assert cli.run(["check", option, str(target)]) == 2
    assert "must name files of their own" in capsys.readouterr().err
    assert Path(read).read_bytes() == before
    assert cli.run(["check", option, "other"]) == 0


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("kv_bytes_per_token <= 2048", "write 2048B or 2048KiB"),
        ("kv_bytes_per_token <= 1_000_000_000", "write 1_000_000_000B"),
        ("kv_bytes_per_token <= 5%", "write 128 KiB"),
        ("kv_bytes_per_token", "write kv_bytes_per_token <= 128 KiB"),
        ("needed <= 20", "write 20GiB, 20GB or 20B"),
        ("needed <= 21474836480", "write 21474836480B"),
        ("weights", "write weights <= 20 GiB"),
    ],
)
def test_units_are_those_of_the_figure(requirement, said, tmp_path, capsys):
    """What is written without a unit, or wrongly, is answered with units that it may have had."""
    path = tmp_path / "kvcalc.yaml"
    path.write_text(
        f"deployments: {{a: {{model: llama-3-8b, kv_memory: 1GiB, require: ['{requirement}']}}}}\n"
    )
    assert cli.run(["check", str(path)]) == 2
    assert capsys.readouterr().err.endswith(f"{said}\n")


def test_a_file_to_start_from(tmp_path, monkeypatch, capsys):
    """`--init` writes a file that holds as it is, and never writes over one."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["check"]) == 2
    assert "--init" in capsys.readouterr().err
    assert cli.run(["check", "--init"]) == 0
    assert "wrote kvcalc.yaml" in capsys.readouterr().err
    assert cli.run(["check", "kvcalc.yaml"]) == cli.run(["check"]) == 0
    assert cli.run(["check", "--init"]) == 2
    assert "kvcalc.yaml is there already" in capsys.readouterr().err
    assert cli.run(["check", "--init", "absent/a.yaml"]) == 2
    assert "cannot write absent/a.yaml" in capsys.readouterr().err


def test_a_sure_failure_counts_more_than_what_is_left_open(tmp_path):
    """One deployment fails and another has no exact size: the status is that of the failure."""
    text = f"{GOOD}    require: [max_concurrency >= 20]\n"
    refused = "  other: {model: Qwen/Qwen3-8B, engine: transformers, gpu: l4}\n"
    report = checked_text(tmp_path, text + refused)
    assert [result.status for result in report.results] == ["fails", "refused"]
    assert report.exit_code == 1


def test_a_baseline_of_another_path_is_the_same(tmp_path, monkeypatch):
    """A deployment that has its name alone is known by it, however its file is named."""
    checked_text(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["check", "kvcalc.yaml", "--out", "before.json"]) == 0
    changed = GOOD.replace("20GiB", "30GiB")
    report = checked_text(tmp_path, changed, name="renamed.yaml", baseline=Path("before.json"))
    (change,) = report.changes
    assert change.said == ""
    assert "kv_memory" in change.figures


def test_the_schema_for_editors_is_that_of_the_reader(capsys):
    """The shipped JSON Schema is what the reader's own tables say, and knows the examples' keys."""
    assert cli.run(["check", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads((EXAMPLE.parent / "schema.json").read_text())
    deployment = schema["properties"]["deployments"]["additionalProperties"]["properties"]
    requirement = deployment["require"]["oneOf"][0]["anyOf"]
    for path in EXAMPLE.parent.glob("*.yaml"):
        data = yaml.safe_load(path.read_text("utf-8"))
        for said in (data["defaults"], *data["deployments"].values()):
            assert set(said) <= set(deployment)
            assert set(said.get("workload", {})) <= set(deployment["workload"]["properties"])
            for text in said.get("require", []):
                assert text in requirement[0]["enum"] or re.search(requirement[1]["pattern"], text)


def readme_block(kind, section="### 4. Guard it in CI"):
    """The first block of a kind in README's section."""
    text = README[README.index(section) :]
    return re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1)


def test_the_pull_request_of_the_readme(tmp_path, monkeypatch, capsys):
    """README's diff, annotation and summary are what happens; its remedy passes."""
    path = Path("profiles/checks/serving.yaml")
    (tmp_path / path).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = EXAMPLE.read_text("utf-8")
    path.write_text(text, "utf-8")
    assert cli.run(["check", str(path), "--out", "before.json"]) == 0
    diff = readme_block("diff").splitlines()
    before = "\n".join(line[1:] for line in diff if line[0] != "+")
    after = "\n".join(line[1:] for line in diff if line[0] != "-")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), "utf-8")
    capsys.readouterr()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert cli.run(["check", str(path), "--baseline", "before.json"]) == 1
    assert capsys.readouterr().err == readme_block("text")
    assert Path("summary.md").read_text("utf-8") == readme_block("markdown")
    path.write_text(text.replace(before, after.replace("count: 2", "count: 4")), "utf-8")
    assert cli.run(["check", str(path)]) == 0


@pytest.mark.parametrize("status", [0, 1])
def test_the_action_runs(status, tmp_path):
    """The steps of action.yml run in bash, with a stand-in for the installer: the check's status,
    its annotations and its summary come out.
    """
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    assert action["runs"]["using"] == "composite"
    install, check = action["runs"]["steps"]
    assert all(step["shell"] == "bash" and "${{" not in step["run"] for step in (install, check))
    inputs = {name: said["default"] for name, said in action["inputs"].items()}
    inputs |= {"files": "kvcalc.yaml other.yaml", "json": "out.json", "junit": "junit.xml"}
    known = {"github.action_path": str(ROOT), "runner.temp": str(tmp_path)}
    known |= {f"inputs.{name}": value for name, value in inputs.items()}
    bin_folder = tmp_path / "kvcalc" / "bin"
    bin_folder.mkdir(parents=True)
    scripts = {
        tmp_path / "python3": '#!/bin/sh\necho "$@" >> installed\n',
        bin_folder / "python": '#!/bin/sh\necho "$@" >> installed\n',
        bin_folder / "kvcalc": f'#!/bin/sh\nexec "{sys.executable}" -m kvcalc "$@"\n',
    }
    for path, script in scripts.items():
        path.write_text(script)
        path.chmod(0o755)
    memory = "9GiB" if status == 0 else "7GiB"
    for name in ("kvcalc.yaml", "other.yaml"):
        (tmp_path / name).write_text(GOOD.replace("20GiB", memory), "utf-8")

    def run(step):
        env = {
            name: re.sub(r"\$\{\{ (.*?) \}\}", lambda found: known[found[1]], value)
            for name, value in step["env"].items()
        }
        env |= {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    assert run(install).returncode == 0
    installed = (tmp_path / "installed").read_text().splitlines()
    assert installed[0] == f"-m venv --without-pip {tmp_path / 'kvcalc'}"
    assert installed[1].endswith(str(ROOT))
    done = run(check)
    assert (done.returncode, done.stderr.count("::error file=")) == (status, 4 * status)
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == status
    assert (tmp_path / "junit.xml").is_file()
    assert (tmp_path / "summary.md").read_text().startswith("### kvcalc check: 2 deployments")


def test_the_hook_runs(tmp_path):
    """pre-commit gives the hook's command the files whose names match."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert hook["language"] == "python"
    names = ["kvcalc.yaml", "deploy/kvcalc-prod.yml", "docs/kvcalculus.yaml", "a/my-kvcalc.yaml"]
    assert [bool(re.search(hook["files"], name)) for name in names] == [True, True, False, False]
    path = tmp_path / "kvcalc.yaml"
    path.write_text(GOOD, "utf-8")
    program, *arguments = hook["entry"].split()
    assert program == "kvcalc"
    assert cli.run([*arguments, str(path)]) == 0


def test_two_hundred_deployments_share_what_is_alike(tmp_path, monkeypatch):
    """A model is read once, and one fit serves all deployments that only require differently."""
    fits = []
    fit = api.fit
    monkeypatch.setattr(api, "fit", lambda *a, **b: fits.append(b) or fit(*a, **b))
    entries = "".join(
        f"  d{index}: {{model: llama-3.1-8b, workload: {{sequence: 8k}}, "
        f"require: max_concurrency >= {index + 1}}}\n"
        for index in range(200)
    )
    report = checked_text(tmp_path, GOOD[: GOOD.index("  chat:")] + entries)
    assert len(report.results) == 200
    assert len(fits) == 1
    assert sum(result.status == "holds" for result in report.results) == 19


def test_check_loads_nothing_that_it_does_not_need():
    """No torch, no hub client, no rich; and `size` loads nothing of it."""
    script = (
        "import sys\nfrom kvcalc.cli import run\n"
        "run(['size', 'llama-3.1-8b', '--seq', '1k', '--json'])\n"
        "assert not {'yaml', 'kvcalc.checking', 'kvcalc.strict_yaml'} & set(sys.modules)\n"
        f"assert run(['check', {str(EXAMPLE)!r}]) == 0\n"
        "assert not {'torch', 'huggingface_hub', 'rich', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_errors_are_kvcalc_errors():
    """A placed error is an InputError, and knows the line."""
    error = strict_yaml.Place("f", 3, "a.b").wrong("no")
    assert isinstance(error, KvcalcError)
    assert (str(error), error.place.line, error.exit_code) == ("f:3: a.b: no", 3, 2)


def test_a_gpus_own_file_stands_beside_the_check(tmp_path, monkeypatch):
    """A path counts from the file that names it, wherever the check runs."""
    (tmp_path / "gpus").mkdir()
    own = (ROOT / "profiles" / "gpus" / "h100-sxm-80gb.yaml").read_text("utf-8")
    (tmp_path / "gpus" / "mine.yaml").write_text(own, "utf-8")
    monkeypatch.chdir(ROOT)
    budget = "gpu: {}\n  share: 0.9\n  reserve: 4GiB"
    own, known = (
        checked_text(tmp_path, GOOD.replace("kv_memory: 20GiB", budget.format(gpu)))
        for gpu in ("gpus/mine.yaml", "h100-sxm-80gb")
    )
    assert own.results[0].figures == known.results[0].figures


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("auto", "auto would depend on the machine that checks: name an id of kvcalc gpus"),
        ("none.yaml", "cannot read .*none.yaml: No such file"),
        ("wrong.yaml", r".*wrong\.yaml:1: name: must be text, not a list"),
    ],
)
def test_a_gpu_that_is_none_is_told_where_it_is_named(gpu, reason, tmp_path):
    """The line is that of the check's file; of a GPU's own file its line stands beside it."""
    names = (ROOT / "profiles" / "gpus" / "l4.yaml").read_text("utf-8").splitlines()
    (tmp_path / "wrong.yaml").write_text("\n".join(["name: [L4]", *names[1:]]), "utf-8")
    text = GOOD.replace("kv_memory: 20GiB", f"gpu: {gpu}\n  reserve: 4GiB")
    ((place, error),) = checked_text(tmp_path, text).errors
    assert place.line == text[: text.index("gpu: ")].count("\n") + 1
    assert re.search(f"gpu: {reason}", str(error))


def test_a_gpu_gives_what_fit_works_out(tmp_path):
    """With `gpu`, `share` and `reserve` the memory and the weights are those of `fit`."""
    budget = {"gpu": "h100-sxm-80gb", "share": "0.9", "reserve": 4 * GIB}
    text = GOOD.replace("kv_memory: 20GiB", "gpu: h100-sxm-80gb\n  share: 0.9\n  reserve: 4GiB")
    figures = one(tmp_path, text.replace("fits", "weights <= 15 GiB")).figures
    fit = kvcalc.fit("meta-llama/Meta-Llama-3-8B", seq="8k", concurrency=8, **budget)
    assert (figures["kv_memory"], figures["weights"]) == (fit.available_bytes, fit.weights_bytes)
    assert figures["weights"] > 14 * GIB


def test_what_estimates_leave_open_is_told(tmp_path, monkeypatch, capsys):
    """A requirement that holds at one end of the estimates' range and not at the other is open,
    exit 3, wherever it is told; what both ends agree on is decided, and a reserve decides all.
    """
    fit = kvcalc.fit("meta-llama/Llama-3-8B", gpu="h100-sxm-80gb", seq="8k")
    fewest, most = fit.max_concurrency_range
    text = (
        "deployments:\n  chat:\n    model: meta-llama/Llama-3-8B\n    gpu: h100-sxm-80gb\n"
        "    workload: {sequence: 8k, concurrency: 4}\n"
        f"    require: [fits, max_concurrency >= {most}]\n"
    )
    result = one(tmp_path, text)
    assert result.status == "open"
    decided, undecided = result.outcomes
    assert (decided.holds, decided.ends) == (True, None)
    assert undecided.ends == (fewest, most)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    junit = tmp_path / "junit.xml"
    file = tmp_path / "kvcalc.yaml"
    assert cli.run(["check", str(file), "--junit", str(junit)]) == 3
    said = f"max_concurrency >= {most} is open: {fewest} to {most} as estimates range"
    shown = capsys.readouterr()
    assert said in shown.out
    assert "1 deployment: 1 is open" in shown.out
    assert said in shown.err
    assert f"is open: {fewest} to {most}" in summary.read_text("utf-8")
    errors = ET.fromstring(junit.read_text("utf-8")).findall(".//error")  # noqa: S314 - ours
    assert [error.get("type") for error in errors] == ["open"]
    for bound, status in ((fewest, "holds"), (most + 1, "fails")):
        assert one(tmp_path, text.replace(f">= {most}", f">= {bound}")).status == status
    assert one(tmp_path, f"{text}    reserve: 4GiB\n").status in {"holds", "fails"}


def test_more_tokens_than_the_model_was_made_for_are_noted(tmp_path, capsys, monkeypatch):
    """They may be served (with scaled positions), so nothing fails, but nobody misses it."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert one(tmp_path, GOOD).note == ""
    path = tmp_path / "kvcalc.yaml"
    path.write_text(GOOD.replace("8k, concurrency: 8", "16k, concurrency: 1"), "utf-8")
    assert cli.run(["check", str(path)]) == 0
    out, notices = capsys.readouterr()
    said = "16,384 tokens is beyond the model's own maximum of 8,192"
    assert f"kvcalc.yaml:5: chat: note: {said}\n" in out
    assert any(line.startswith("::notice ") and line.endswith(said) for line in notices.split("\n"))
    report = checking.check([path])
    assert f"- chat: {said}\n" in checked.step_summary(report)
    assert report.to_dict()["deployments"][0]["note"] == said


def test_headroom_that_nothing_fits_into_does_not_hold(tmp_path):
    """Nor do requests beyond the server's own bound count, with a shared prefix either."""
    text = """\
deployments:
  pools:
    model: Qwen/Qwen3-0.6B
    kv_memory: 3GiB
    options: {max_model_len: 32k}
    workload: {sequence: 4k, concurrency: 2}
    require: [headroom >= 10%, headroom >= 0%]
"""
    result = one(tmp_path, text)
    assert result.figures["headroom"] > 0
    assert [outcome.holds for outcome in result.outcomes] == [False, False]
    assert "vLLM does not start for max_model_len" in checked.told(checked_text(tmp_path, text))
    shared = text.replace("max_model_len: 32k", "max_num_seqs: 128").replace("3GiB", "60GiB")
    shared = shared.replace("concurrency: 2", "concurrency: 2, prefix_share: 90%")
    assert one(tmp_path, shared).figures["max_concurrency"] == 128
