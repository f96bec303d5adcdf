"""Bad input: one line on stderr, nothing on stdout, and a status that says what to do next."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcalc
from kvcalc.cli import run
from kvcalc.sources import catalogue

BAD, REFUSED = 2, 3

LLAMA = "meta-llama/Meta-Llama-3-8B"
GEMMA = "google/gemma-3-1b-it"  # model_type gemma3_text
WRAPPED_GEMMA = "google/gemma-3-27b-it"  # gemma3_text inside a gemma3
DEEPSEEK = "deepseek-ai/DeepSeek-V3"
KIMI = "moonshotai/Kimi-K2-Instruct"  # transformers has no kimi_k2, so no class defaults
HUNYUAN = "tencent/Hunyuan-A13B-Instruct"
GPT2 = "openai-community/gpt2"

ABSENT = object()
WRONG_COUNTS = ("32", 32.0, True, [32], {}, 0, -1, 2**31, 10**30)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No test here may reach a hub or see the user's own cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("KVCALC_DEBUG", raising=False)


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail; gives its status and its one line of complaint."""

    def run_command(*arguments):
        status = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("\n")
        line = err.removesuffix("\n")
        assert line.startswith("kvcalc: ")
        assert line.isprintable(), "a second line, or control characters for the terminal"
        return status, line

    return run_command


def changed(name, **changes):
    """A catalogue entry's config with other fields."""
    config = {**catalogue.find(name).config, **changes}
    return {key: value for key, value in config.items() if value is not ABSENT}


def written(folder, config):
    """The path of a config.json with this content."""
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["meta-llama/Lama-3-8B", "Lama-3-8B", "llama 3 8b"])
def test_a_misspelt_name_gets_a_suggestion(complaint, name):
    """A name that is close to a catalogue name is answered with that name."""
    status, line = complaint("size", name)
    assert status == BAD
    assert f"Did you mean {LLAMA}" in line


@pytest.mark.parametrize(
    "name",
    ["no/such/model", "./nope", "nope.json", "/nope/config.json", "a b", "x\ny", "\0", "z" * 5000],
)
def test_a_name_that_is_nothing(complaint, name):
    """What is neither path, catalogue name nor Hugging Face id is named back, shortened."""
    status, line = complaint("size", name)
    assert status == BAD
    assert line.startswith(("kvcalc: no model '", "kvcalc: no file or folder '"))
    assert len(line) < 400


CHECKED = f"deployments:\n  chat: {{model: {LLAMA}, kv_memory: 30GiB, require: [fits]}}\n"


@pytest.fixture
def odd_paths(tmp_path, monkeypatch):
    """A folder to be in, with links that go round in circles, a folder and a good check."""
    monkeypatch.chdir(tmp_path)
    Path("round").symlink_to("about")
    Path("about").symlink_to("round")
    Path("dangling").symlink_to("nowhere/at-all")
    for folder in ("folder", "folder.yaml", "folder.gguf", "model/config.json"):
        Path(folder).mkdir(parents=True)
    Path("kvcalc.yaml").write_text(CHECKED)


FOLDERS = ["./folder", "folder.yaml", "./folder.gguf", "./model"]
ODD_PATHS = [
    *("round", "./round", "round/x", "./round/x.json", "round.yaml", "dangling", "./dangling"),
    *(*FOLDERS, "kvcalc.yaml/x", "./kvcalc.yaml/x.yaml", " "),
    *("~nobody-has-this-name/x", "~nobody-has-this-name/x.yaml", "~nobody-has-this-name"),
    *("z" * 256, "z" * 300 + ".yaml", "./" + "z" * 5000, "org/" + "z" * 256, "z/" * 3000),
]
WITH_NUL = ["a\0b", "./a\0b", "a\0b.yaml", "~\0"]
"""No command line can have them, a YAML can."""


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: repr(path)[:30])
@pytest.mark.parametrize(
    "command",
    [
        ["size", "PATH", "--seq", "1k"],
        ["fit", "PATH", "--gpu", "l4"],
        ["plan", "PATH", "--gpu", "l4"],
        ["fit", LLAMA, "--gpu", "PATH"],
        ["plan", LLAMA, "--gpu", "PATH"],
        ["plan", LLAMA, "--gpu", "l4", "--prices", "PATH"],
        ["fit", "--gpu", "l4", "--from", "PATH"],
        ["fit", "--gpu", "l4", "--from", "vllm serve 'PATH'"],
        ["size", "org/name", "--revision", "PATH"],
        ["gpus", "--yaml", "PATH"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("odd_paths")
def test_a_path_that_is_odd(complaint, command, path):
    """Wherever a path may be given, an odd one is bad input: a loop of links, a folder, a home that
    nobody has, a NUL, a name that is too long.
    """
    status, line = complaint(*(word.replace("PATH", path) for word in command))
    assert status == BAD, line


@pytest.mark.parametrize("path", ODD_PATHS + WITH_NUL, ids=lambda path: repr(path)[:30])
@pytest.mark.parametrize(
    "words",
    ["model: PATH, kv_memory: 1GiB", f"model: {LLAMA}, gpu: PATH"],
)
@pytest.mark.usefixtures("odd_paths")
def test_a_path_in_a_check_that_is_odd(capsys, words, path):
    """So it is where a check names it, and the line says where."""
    quoted = json.dumps(path)
    Path("odd.yaml").write_text(
        f"deployments:\n  chat: {{{words.replace('PATH', quoted)}, require: [fits]}}\n"
    )
    status = run(["check", "odd.yaml"])
    told = capsys.readouterr().err
    assert status == BAD, told
    assert told.startswith("kvcalc: odd.yaml:2: deployments.chat")


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: repr(path)[:30])
@pytest.mark.parametrize(
    "command", ["PATH", "--baseline PATH", "--out PATH/x", "--junit PATH/x", "--init PATH/x"]
)
@pytest.mark.usefixtures("odd_paths")
def test_a_file_of_a_check_that_is_odd(capsys, command, path):
    """So are the files of a check itself; in a folder, of whatever name, one can be written."""
    status = run(["check", *(word.replace("PATH", path) for word in command.split())])
    told = capsys.readouterr().err
    fine = command.endswith("/x") and path in FOLDERS
    assert status == (0 if fine else BAD), told
    assert fine or "kvcalc: " in told


def test_an_empty_name_is_not_the_current_folder(complaint, monkeypatch, tmp_path):
    """An empty argument (an unset shell variable) names no model, whatever folder we are in."""
    written(tmp_path, changed(LLAMA))
    monkeypatch.chdir(tmp_path)
    status, line = complaint("size", "", "--seq", "4k")
    assert status == BAD
    assert "''" in line


def test_a_model_that_only_the_hub_could_know_while_offline(complaint):
    """Offline, the message says so and gives the way out."""
    status, line = complaint("size", "some-org/some-model")
    assert status == BAD
    assert "HF_HUB_OFFLINE" in line
    assert "config.json" in line


def test_a_revision_of_a_catalogue_model_while_offline(complaint):
    """A model that the catalogue has is not called unknown, nor suggested for itself."""
    status, line = complaint("size", LLAMA, "--revision", "v2")
    assert status == BAD
    assert "neither in the catalogue" not in line
    assert f"Did you mean {LLAMA}" not in line


def test_a_folder_without_config(complaint, tmp_path):
    """A folder that is no model folder is named, with what was looked for."""
    status, line = complaint("size", tmp_path)
    assert status == BAD
    assert f"no config.json in {tmp_path}" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b'{"model_type": "llama"', "is not JSON", id="cut off"),
        pytest.param(b"[1, 2]", "holds an array, not a JSON object", id="array"),
        pytest.param(b"3", "not a JSON object", id="number"),
        pytest.param(b"null", "not a JSON object", id="null"),
        pytest.param(b"\x7fELF\x02\x00\xff\xfe", "is not text", id="binary"),
        pytest.param("{}".encode("utf-16"), "is not text", id="utf-16"),
        pytest.param(b"[" * 100_000, "is not JSON", id="deep arrays"),
        pytest.param(b'{"a":' * 100_000, "is not JSON", id="deep objects"),
        pytest.param(b"9" * 5000, "is not JSON", id="5000 digits"),
        pytest.param(b"{}", "no model_type", id="no model_type"),
        pytest.param(b'{"model_type": 3}', "model_type 3", id="model_type no string"),
    ],
)
def test_a_file_that_is_no_config(complaint, tmp_path, content, said):
    """What is no JSON object of a transformers model is told by what it is, with its path."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    status, line = complaint("size", path, "--seq", "4k")
    assert status == BAD
    assert said in line
    assert len(line) < 400


def test_a_config_of_50_megabytes(complaint, tmp_path):
    """A file too large to be a config is refused by its size, unread."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    status, line = complaint("size", path)
    assert status == BAD
    assert "larger than" in line


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_file_without_end():
    """A device that never ends is not read into memory."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from kvcalc.cli import run; sys.exit(run(['size', '/dev/zero']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == BAD
    assert done.stderr.startswith("kvcalc: /dev/zero ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_an_unreadable_file(complaint, tmp_path):
    """A file without read permission is named with the system's reason."""
    path = written(tmp_path, {})
    path.chmod(0)
    status, line = complaint("size", path)
    assert status == BAD
    assert f"cannot read {path}: Permission denied" in line


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_that_is_none(complaint, tmp_path, number):
    """NaN and infinities are no sizes."""
    text = json.dumps(changed(LLAMA, hidden_size="HERE")).replace('"HERE"', number)
    status, line = complaint("size", written(tmp_path, text), "--seq", "4k")
    assert status == BAD
    assert number in line or "hidden_size is inf" in line


@pytest.mark.parametrize("value", WRONG_COUNTS, ids=repr)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        (LLAMA, "num_hidden_layers"),
        (LLAMA, "num_attention_heads"),
        (LLAMA, "num_key_value_heads"),
        (LLAMA, "hidden_size"),
        (LLAMA, "head_dim"),
        (LLAMA, "max_position_embeddings"),
        (GEMMA, "sliding_window"),
        (GEMMA, "sliding_window_pattern"),
        (KIMI, "kv_lora_rank"),
        (KIMI, "qk_rope_head_dim"),
    ],
)
def test_a_count_that_is_none(complaint, tmp_path, name, key, value):
    """A field that must be a whole number in range is named with the value found."""
    path = written(tmp_path, changed(name, **{key: value}))
    status, line = complaint("size", path, "--seq", "4k")
    assert status == BAD
    assert f"config field {key} is {value!r}" in line


@pytest.mark.parametrize("value", [10_001, 10**9])
def test_more_layers_than_a_model_can_have(complaint, tmp_path, value):
    """A hostile number of layers is refused before anything is built from it."""
    path = written(tmp_path, changed(LLAMA, num_hidden_layers=value))
    status, line = complaint("size", path, "--seq", "4k")
    assert status == BAD
    assert f"num_hidden_layers is {value}" in line


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (KIMI, {"num_hidden_layers": ABSENT}, ["no num_hidden_layers"]),
        (KIMI, {"qk_rope_head_dim": None}, ["qk_rope_head_dim is None"]),
        (LLAMA, {"hidden_size": 4097}, ["hidden_size 4097", "32 num_attention_heads"]),
        (LLAMA, {"num_key_value_heads": 3}, ["32 num_attention_heads", "3 num_key_value_heads"]),
        (LLAMA, {"num_key_value_heads": 64}, ["32 num_attention_heads", "64 num_key_value_heads"]),
        (GPT2, {"n_embd": 768, "hidden_size": 1024}, ["hidden_size = 1024", "n_embd = 768"]),
        (GEMMA, {"layer_types": ["full_attention"] * 3}, ["3 layer_types", "26 num_hidden"]),
        (LLAMA, {"layer_types": ["full_attention"] * 3}, ["3 layer_types", "32 num_hidden"]),
        (GEMMA, {"layer_types": "full_attention"}, ["layer_types is 'full_attention'"]),
        (GEMMA, {"layer_types": [1] * 26}, ["layer_types is [1, 1"]),
        (LLAMA, {"torch_dtype": "nonsense"}, ["torch_dtype", "'nonsense'"]),
        (LLAMA, {"torch_dtype": ["bfloat16"]}, ["torch_dtype", "bfloat16"]),
        (LLAMA, {"torch_dtype": 16}, ["torch_dtype", "16"]),
        (WRAPPED_GEMMA, {"text_config": "gemma"}, ["text_config", "'gemma'"]),
        (WRAPPED_GEMMA, {"text_config": [1]}, ["text_config", "[1]"]),
        (LLAMA, {"quantization_config": "fp8"}, ["quantization_config", "'fp8'"]),
        (
            LLAMA,
            {"quantization_config": {"kv_cache_scheme": 3}},
            ["quantization_config.kv_cache_scheme", "3"],
        ),
        (
            LLAMA,
            {"quantization_config": {"kv_cache_quant_algo": "FP7"}},
            ["quantization_config.kv_cache_quant_algo", "'FP7'"],
        ),
    ],
    ids=repr,
)
def test_a_config_that_cannot_be(complaint, tmp_path, name, changes, said):
    """A missing, ill-typed or contradictory field is named with its value."""
    path = written(tmp_path, changed(name, **changes))
    status, line = complaint("size", path, "--seq", "4k")
    assert status == BAD
    assert [words for words in said if words not in line] == []


@pytest.mark.parametrize("scheme", [{"num_bits": [8]}, {"type": {}}, {"num_bits": 3}, {}], ids=repr)
def test_a_kv_cache_scheme_that_is_unknown(complaint, tmp_path, scheme):
    """A declared KV quantisation is understood or named, of whatever type its parts are."""
    changes = {"quantization_config": {"kv_cache_scheme": scheme}}
    status, line = complaint("size", written(tmp_path, changed(LLAMA, **changes)), "--seq", "4k")
    assert status in (BAD, REFUSED)
    assert "quantization_config.kv_cache_scheme" in line


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        (LLAMA, {"model_type": "unheard_of", "window_kind": "own"}, ["model_type"]),
        (HUNYUAN, {"use_mla": True, "kv_lora_rank": 512}, ["kv_lora_rank"]),
        (LLAMA, {"sliding_window": 4096}, ["sliding_window"]),
        (LLAMA, {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        (LLAMA, {"layer_types": ["linear_attention"] * 32}, ["layer_types"]),
        (GEMMA, {"layer_types": ["full_attention"] * 25 + ["mamba"]}, ["layer_types"]),
        (DEEPSEEK, {"index_head_dim": 128}, ["index_head_dim"]),
        (KIMI, {"kv_lora_rank": ABSENT}, ["kv_lora_rank", "use_mla"]),
    ],
    ids=repr,
)
def test_an_architecture_that_is_refused(complaint, tmp_path, name, changes, fields):
    """Where no exact size is known the model is refused, with the fields that decided it."""
    path = written(tmp_path, changed(name, **changes))
    status, line = complaint("size", path, "--seq", "4k")
    assert status == REFUSED
    _, _, deciding = line.partition("deciding field")
    assert [field for field in fields if field not in deciding] == []


def test_remote_code_is_refused_and_never_run(complaint, tmp_path):
    """A model that only its repository's own code describes is refused without running it."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')\nclass EvilConfig:\n    model_type = 'evil'\n"
    for module in ("configuration_evil.py", "modeling_evil.py", "__init__.py"):
        (tmp_path / module).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig"}
    written(tmp_path, changed(LLAMA, model_type="evil", auto_map=auto_map, window_kind="own"))
    status, line = complaint("size", tmp_path, "--seq", "4k")
    assert status == REFUSED
    assert "configuration_evil.EvilConfig" in line
    assert "never run" in line
    config = changed(LLAMA, model_type="evil", auto_map=auto_map)
    assert kvcalc.size(config, seq=4096).provenance == "inferred from fields"
    assert not marker.exists()


def test_a_config_cannot_write_to_the_terminal(complaint, tmp_path):
    """Control characters in a config do not reach the terminal through the message."""
    auto_map = {"AutoConfig": "\x1b[2J\x1b[31mall is well"}
    path = written(
        tmp_path, changed(LLAMA, model_type="evil", auto_map=auto_map, window_kind="own")
    )
    assert complaint("size", path)[0] == REFUSED


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--seq", "0"], BAD, "--seq must be at least 1, not 0"),
        (["--seq", "-1"], BAD, "--seq '-1'"),
        (["--seq", "1e9"], BAD, "--seq '1e9'"),
        (["--seq", "nan"], BAD, "--seq 'nan'"),
        (["--seq", "128q"], BAD, "--seq '128q'"),
        (["--seq", "1.0001"], BAD, "not a whole number of tokens"),
        (["--seq", ""], BAD, "--seq ''"),
        (["--seq", "4k,"], BAD, "--seq ''"),
        (["--seq", str(2**40 + 1)], BAD, "--seq must be at most 1,099,511,627,776"),
        (["--seq", "9" * 60], BAD, "--seq"),
        (["--context", "x"], BAD, "--seq 'x'"),
        (["--seq"], BAD, "--seq"),
        (["--batch", "0"], BAD, "--batch must be at least 1, not 0"),
        (["--batch", "1.5"], BAD, "--batch '1.5'"),
        (["--batch", str(2**31)], BAD, "--batch must be at most"),
        (["--batch", str(10**30)], BAD, "--batch"),
        (["--tp", "0"], BAD, "tp must be at least 1, not 0"),
        (["--tp", "x"], BAD, "'--tp': 'x'"),
        (["--tp", str(10**30)], BAD, "tp must be at most"),
        (["--tp", "3"], REFUSED, "8 KV heads"),
        (["--pp", "0"], BAD, "pp must be at least 1, not 0"),
        (["--pp", "33"], REFUSED, "--pp 33 is more stages than the model has layers (32)"),
        (["--kv-dtype", "fp7"], BAD, "unknown dtype 'fp7'"),
        (["--engine", "tgi"], BAD, "unknown engine 'tgi'"),
        (["--engine", "../model"], BAD, "unknown engine '../model'"),
        (["--engine", "transformers", "--tp", "2"], REFUSED, "--engine model"),
        (["--strategy", "h3o"], BAD, "unknown strategy 'h3o'"),
        (["--strategy", "int4.cache"], BAD, "unknown strategy 'int4.cache'"),
        (["--strategy", "int4:width=3"], BAD, "no parameter 'width'; its parameters: group"),
        (["--strategy", "int4:group=x"], BAD, "group must be a whole number, not 'x'"),
        (["--strategy", "int4:group=0"], BAD, "group must be at least 2, not 0"),
        (["--strategy", "int4:group=7"], REFUSED, "groups of 7"),
        (["--strategy", "dynamic:group=32"], BAD, "its parameters: none"),
        (["--frobnicate"], BAD, "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_option_that_cannot_be(complaint, options, status, said):
    """A bad option value is named with the option and the value, a bad combination is refused."""
    seq = [] if options[0] in ("--seq", "--context") else ["--seq", "4k"]
    found, line = complaint("size", LLAMA, *seq, *options)
    assert found == status, line
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
        (["size"], "MODEL"),
        (["strategies", "a", "b"], "b"),
        (["strategies", "h3o"], "unknown strategy 'h3o'"),
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be(complaint, arguments, said):
    """A command line that does not parse is told in one line."""
    status, line = complaint(*arguments)
    assert status == BAD
    assert said in line


def test_bad_models_among_good_ones(capsys, tmp_path):
    """Each bad model gets its own line and the good ones are sized; the gravest status counts."""
    refused = str(written(tmp_path, changed(LLAMA, sliding_window=4096)))
    status = run(["size", LLAMA, "no/such/model", refused, "--seq", "4k"])
    out, err = capsys.readouterr()
    assert status == REFUSED
    assert "536,870,912" in out
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["kvcalc", "no/such/model"],
        ["kvcalc", refused],
    ]


@pytest.mark.parametrize(
    ("changes", "point"),
    [
        ({}, {"seq": 10**5000}),
        ({}, {"seq": 1, "batch": 10**5000}),
        ({}, {"seq": 1, "tp": 10**5000}),
        ({"hidden_size": 10**5000}, {"seq": 1}),
        ({}, {"seq": True}),
        ({}, {"seq": 1, "batch": "2"}),
    ],
    ids=["seq", "batch", "tp", "hidden_size", "boolean seq", "string batch"],
)
def test_python_callers_get_an_input_error(changes, point):
    """Numbers that only Python can pass (too long to print, of the wrong type) are input errors."""
    with pytest.raises(kvcalc.InputError):
        kvcalc.size(changed(LLAMA, **changes), **point)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([2**31, 10**9, 10**30, -(10**30), 0.5, 128.0, float("nan"), float("inf")])
    | st.sampled_from(["", "128", "auto", "fp8", "full_attention", "sliding_attention", "x\x1b"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "model_type",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "sliding_window_pattern",
        "use_sliding_window",
        "layer_types",
        "max_window_layers",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "use_mla",
        "n_embd",
        "text_config",
        "torch_dtype",
        "dtype",
        "quantization_config",
        "num_nextn_predict_layers",
        "auto_map",
        "is_encoder_decoder",
        "attn_type_list",
        "index_head_dim",
        "_name_or_path",
        "n_layer",
        "n_head",
    ]
)
QUANTIZATION = st.dictionaries(
    st.sampled_from(["kv_cache_scheme", "kv_cache_quant_algo"]),
    JSON_VALUES | st.dictionaries(st.sampled_from(["num_bits", "type"]), JSON_VALUES),
)
CHANGES = st.lists(
    st.tuples(KEYS, JSON_VALUES | st.just(ABSENT))
    | st.tuples(st.just("layer_types"), st.lists(JSON_VALUES, min_size=24, max_size=28))
    | st.tuples(st.just("quantization_config"), QUANTIZATION),
    min_size=1,
    max_size=4,
)
ENCODERS = st.sampled_from([None, 512])

NAMES = [LLAMA, GEMMA, WRAPPED_GEMMA, DEEPSEEK, KIMI, GPT2, "Qwen/Qwen2.5-7B-Instruct"]


def mutate(config, data):
    """Change, remove or add some fields of a config, the nested ones among them."""
    for _ in range(data.draw(st.integers(1, 4))):
        place = config
        nested = [value for value in place.values() if isinstance(value, dict)]
        if nested and data.draw(st.booleans()):
            place = data.draw(st.sampled_from(nested))
        key = data.draw(st.sampled_from(sorted(place)) | KEYS if place else KEYS)
        value = place.get(key)
        change = data.draw(st.sampled_from(["any", "any", "negative", "absent", "list", "longer"]))
        if change == "negative" and isinstance(value, int):
            place[key] = -value
        elif change == "absent":
            place.pop(key, None)
        elif change == "list":
            place[key] = [value] * data.draw(st.integers(0, 5))
        elif change == "longer" and isinstance(value, list | str):
            place[key] = value * data.draw(st.integers(0, 3))
        else:
            place[key] = data.draw(JSON_VALUES)


EXAMPLES = int(os.environ.get("KVCALC_FUZZ_EXAMPLES", "300"))
"""How many mutated configs each of the two tests below tries."""


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(catalogue.names()), st.data())
def test_any_published_config_may_be_mutilated(name, data):
    """However a published config is mutated, the answer is a report or a KvcalcError."""
    config = copy.deepcopy(dict(catalogue.find(name).config))
    mutate(config, data)
    engine = data.draw(st.sampled_from(["model", "transformers"]))
    try:
        report = kvcalc.size(config, seq=4096, engine=engine, encoder_seq=data.draw(ENCODERS))
    except kvcalc.KvcalcError as error:
        assert str(error)  # noqa: PT017 - either outcome is fine
    else:
        assert type(report.total_bytes) is int
        assert report.total_bytes >= 0
        json.dumps(report.to_dict())


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(NAMES), CHANGES, st.sampled_from(["", "", "gemma3"]), st.booleans())
def test_any_config_is_sized_or_refused(name, changes, wrapper, inside):
    """However a config is mutilated, the answer is a report or a KvcalcError, nothing else."""
    config = changed(name)
    text = config.get("text_config")
    if inside and isinstance(text, dict):
        config["text_config"] = {**text, **{k: v for k, v in changes if v is not ABSENT}}
    else:
        config = changed(name, **dict(changes))
    if wrapper:
        config = {"model_type": wrapper, "text_config": config}
    try:
        report = kvcalc.size(config, seq=4096)
    except kvcalc.KvcalcError as error:
        assert str(error)  # noqa: PT017 - either outcome is fine
    else:
        assert type(report.total_bytes) is int
        assert report.total_bytes >= 0
        json.dumps(report.to_dict())


@pytest.mark.parametrize("text", ["131,072", "256,512", "1,024,096"])
def test_a_comma_that_may_group_or_list(complaint, text):
    """Digits in threes with commas could be one number or several: refused, with both spellings."""
    status, line = complaint("size", LLAMA, "--seq", text)
    assert status == BAD
    assert "--seq " + text.replace(",", "_") in line
    assert all(f"--seq {part.lstrip('0')}" in line for part in text.split(","))


def test_a_revision_of_a_catalogued_model(complaint):
    """A revision that is not to be had says so, and not that the model is unknown."""
    status, line = complaint("size", LLAMA, "--revision", "v2")
    assert status == BAD
    assert f"revision v2 of {LLAMA} is not in the local Hugging Face cache" in line
    assert "in the catalogue" not in line
    assert "Did you mean" not in line


def test_a_wrapper_around_an_unknown_decoder(complaint, tmp_path):
    """The refusal names the field that decides: the inner type, not the wrapper's."""
    config = {"model_type": "llava", "text_config": {"model_type": "reformer"}}
    status, line = complaint("size", written(tmp_path, config))
    assert status == REFUSED
    assert "deciding field: text_config.model_type" in line
