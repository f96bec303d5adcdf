"""A GGUF file as a model: what its metadata says, and that no file breaks the reader."""

import contextlib
import json
import os
import struct
import subprocess
import sys

import gguf_files
import pytest
from gguf_files import BASE, FILES, Typed, encode, pairs_of
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc.cli import run
from kvcalc.sources import catalogue, gguf, gguf_config

VOCABULARY = {"tokenizer.ggml.tokens": ["<s>", "a", "b" * 5000], "tokenizer.ggml.scores": [0.5] * 3}


def written(folder, architecture, keys, *, name="model.gguf", **more):
    """A file with these keys and a vocabulary, some tensors' worth of bytes behind them."""
    path = folder / name
    pairs = pairs_of(architecture, keys) | VOCABULARY | more
    path.write_bytes(encode(pairs, tensors=3) + bytes(64))
    return path


def as_converted(name):
    """Architecture and keys that llama.cpp's converter writes for models of the catalogue."""
    config = catalogue.find(name).config
    config = config.get("text_config", config)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings", 4096),
        "embedding_length": config.get("hidden_size", 4096),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if "head_dim" in config:
        keys["attention.key_length"] = keys["attention.value_length"] = config["head_dim"]
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
    own = {
        "deepseek_v3": lambda: {
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": config["kv_lora_rank"],
            "attention.key_length": config["kv_lora_rank"] + config["qk_rope_head_dim"],
            "attention.value_length": config["kv_lora_rank"],
            "attention.key_length_mla": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "attention.value_length_mla": config["v_head_dim"],
            "rope.dimension_count": config["qk_rope_head_dim"],
        },
        "falcon_h1": lambda: {
            "ssm.conv_kernel": config["mamba_d_conv"],
            "ssm.inner_size": config["mamba_d_ssm"],
            "ssm.state_size": config["mamba_d_state"],
            "ssm.time_step_rank": config["mamba_n_heads"],
            "ssm.group_count": config["mamba_n_groups"],
        },
        "qwen3_5_text": lambda: {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.group_count": config["linear_num_key_heads"],
            "full_attention_interval": 4,
        },
        "gemma4_text": lambda: {
            "attention.sliding_window_pattern": [
                kind == "sliding_attention" for kind in config["layer_types"]
            ],
            "attention.key_length": config["global_head_dim"],
            "attention.value_length": config["global_head_dim"],
            "attention.key_length_swa": config["head_dim"],
            "attention.value_length_swa": config["head_dim"],
            "attention.shared_kv_layers": config["num_kv_shared_layers"],
        },
    }.get(config.get("model_type", "gemma4_text"), dict)
    return keys | own()


@pytest.mark.parametrize("engine", ["model", "llama.cpp"])
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("meta-llama/Meta-Llama-3-8B", "llama"),
        ("Qwen/Qwen3-4B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-FP8", "qwen3moe"),
        ("google/gemma-2-2b-it", "gemma2"),
        ("google/gemma-3-27b-it", "gemma3"),
        ("google/gemma-4-E4B-it", "gemma4"),
        ("openai/gpt-oss-20b", "gpt-oss"),
        ("deepseek-ai/DeepSeek-V3", "deepseek2"),
        ("tiiuae/Falcon-H1-7B-Instruct", "falcon-h1"),
        ("Qwen/Qwen3.5-27B", "qwen35"),
    ],
)
def test_a_file_is_sized_as_the_model_it_was_made_of(tmp_path, name, architecture, engine):
    """Config and metadata of a published model give the same bytes, layer by layer."""
    path = written(tmp_path, architecture, as_converted(name))
    point = {"seq": 5000, "batch": 2, "engine": engine, "kv_dtype": "fp16"}
    file, model = kvcalc.size(path, **point), kvcalc.size(name, **point)
    assert file.total_bytes == model.total_bytes
    assert file.to_dict()["layers"] == model.to_dict()["layers"]


def test_what_is_told(tmp_path, capsys):
    """The report names the file and its architecture, and says how an old file is kept."""
    path = written(tmp_path, *FILES["deepseek2 of 2024"])
    assert run(["size", str(path), "--seq", "4k", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == {"kind": "file", "detail": str(path), "completeness": "verbatim"}
    assert "(deepseek2)" in report["notes"][0]
    assert "--option mla=false" in report["notes"][1]
    assert report["max_tokens"] == 4096


@pytest.mark.parametrize("name", FILES)
def test_every_architecture_is_sized(tmp_path, name):
    """A small file of each becomes layers, one for each decoder layer, in both engines."""
    architecture, keys = FILES[name]
    path = written(tmp_path, architecture, keys)
    layers = keys["block_count"] - keys.get("nextn_predict_layers", 0)
    for engine in ("model", "llama.cpp"):
        report = kvcalc.size(path, seq=100, engine=engine)
        assert len(report.to_dict()["layers"]) == layers
        assert report.total_bytes > 0


@pytest.mark.parametrize("architecture", gguf_config.PLAIN)
def test_plain_architectures_keep_every_token(architecture):
    """Whatever their class fills in, KV heads and widths are the file's."""
    keys = BASE | {"attention.head_count_kv": 8}
    config, _ = gguf_config.translate(pairs_of(architecture, keys), name="x")
    report = kvcalc.size(config, seq=100, kv_dtype="fp16")
    assert report.total_bytes == 6 * 100 * 8 * 2 * 32 * 2


def test_which_layers_slide():
    """By a list, by a period of the file, or by that of the architecture."""
    keys = BASE | {"attention.sliding_window": 128, "block_count": 8}

    def slides(architecture, **own):
        pattern = {f"attention.{key}": item for key, item in own.items()}
        config, _ = gguf_config.translate(pairs_of(architecture, keys | pattern), name="x")
        return "".join(kind[0] for kind in config["layer_types"])

    assert slides("gemma3") == "sssssfss"
    assert slides("gpt-oss") == "sfsfsfsf"
    assert slides("laguna") == "fsssfsss"
    assert slides("gemma3", sliding_window_pattern=4) == "sssfsssf"
    assert slides("gemma3", sliding_window_pattern=(True,) * 3 + (False,) * 5) == "sssfffff"
    assert slides("gemma3", sliding_window=0) == "ffffffff"
    assert slides("llama4") == "cccfcccf"
    assert slides("llama4", sliding_window=0) == "ffffffff"


def test_prediction_layers_are_not_the_decoders():
    """They are told, and counted when asked for."""
    architecture, keys = FILES["glm4moe with MTP"]
    config, _ = gguf_config.translate(pairs_of(architecture, keys), name="x")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (5, 1)
    one, two = (kvcalc.size(config, seq=64, mtp=mtp).total_bytes for mtp in (0, 1))
    assert two * 5 == one * 6


def test_a_file_without_a_suffix(tmp_path):
    """Ollama names its files by a checksum: the first bytes tell."""
    path = written(tmp_path, "llama", BASE, name="sha256-0123")
    assert kvcalc.size(path, seq=1).total_bytes == 6 * 4 * 2 * 32 * 2


def test_a_missing_file_is_not_looked_for_on_the_hub():
    """A name that ends in .gguf can only be a file."""
    with pytest.raises(kvcalc.ModelNotFoundError, match="no file or folder"):
        kvcalc.size("org/model-Q4_K_M.gguf", seq=1)


def test_only_gguf_files_load_the_reader(tmp_path):
    """Other models are sized without it, and with it nothing else than the standard library."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    path = written(tmp_path, "llama", BASE)
    for model, loaded in ((config, False), ("gpt2", False), (path, True)):
        script = (
            "import sys; from kvcalc.cli import run;"
            f"run(['size', {str(model)!r}, '--seq', '4k', '--json']);"
            "found = {'kvcalc.sources.gguf', 'mmap', 'numpy', 'gguf'} & set(sys.modules);"
            "print(*sorted(found), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stderr.split() == (["kvcalc.sources.gguf", "mmap"] if loaded else [])


GOOD = encode(pairs_of("llama", BASE) | VOCABULARY)
HUGE = 2**63


def array(kind, count, body=b""):
    """An array that says its own count."""
    return Typed(9, struct.pack("<IQ", kind, count) + body)


BAD = {
    "empty": (b"", "is empty"),
    "another file": (b"PK\x03\x04" + bytes(99), "not b'GGUF'"),
    "nothing but the magic word": (b"GGUF", "cut off"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "of version 1, not"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no keys": (encode({}), "names no general.architecture"),
    "more keys than there are": (encode({}, count=3), "cut off"),
    "a huge number of keys": (encode({}, count=HUGE), "more than 65,536"),
    "a key of huge length": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE),
        "cut off, or a length in it is wrong",
    ),
    "a long key": (encode({"k" * 70_000: 1}), "a key of it is too long"),
    "a key twice": (
        encode({"a": 1}, count=2) + encode({"a": 1})[24:],
        "the key 'a' twice",
    ),
    "an unknown type": (encode({"a": Typed(13, b"")}), "of type 13"),
    "an array of an unknown type": (encode({"a": array(99, 1)}), "values of type 99"),
    "arrays in an array": (encode({"a": array(9, 1)}), "an array with arrays in it"),
    "a huge array": (encode({"a": array(4, HUGE)}), "cut off"),
    "an array that overflows": (encode({"a": array(10, 2**61)}), "cut off"),
    "a huge array of strings": (encode({"a": array(8, HUGE)}), "says that it has"),
    "an array of strings cut off": (encode({"a": array(8, 9)}), "cut off in 'a'"),
    "a huge string in an array": (
        encode({"a": array(8, 1, struct.pack("<Q", HUGE))}),
        "cut off",
    ),
    "a later part": (encode({"split.no": 2}), "part 3 of a split model; give the first"),
    "an architecture that is no text": (encode({"general.architecture": 5}), "names no general"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name, capsys):
    """Each gives one line that names the file and what is wrong with it."""
    content, words = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(kvcalc.ConfigError) as error:
        kvcalc.size(path, seq=1)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert run(["size", str(path), "--seq", "1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_and_folders_are_no_gguf_files(tmp_path):
    """A pipe of that name is refused without waiting for a writer."""
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(kvcalc.ConfigError, match="is not a file"):
        kvcalc.size(tmp_path / "pipe.gguf", seq=1)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(kvcalc.ModelNotFoundError, match=r"no config\.json"):
        kvcalc.size(tmp_path / "folder.gguf", seq=1)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"block_count": None}, "has no llama.block_count"),
        ("llama", {"block_count": 0}, "llama.block_count = 0"),
        ("llama", {"block_count": 2**31}, "llama.block_count = 2147483648"),
        ("llama", {"block_count": 50_000}, "at most 10,000"),
        ("llama", {"block_count": 2.5}, "llama.block_count = 2.5"),
        ("llama", {"block_count": "six"}, "llama.block_count = 'six'"),
        ("llama", {"attention.head_count": 0}, "llama.attention.head_count = 0"),
        ("llama", {"attention.head_count_kv": [4, 4]}, "an array of 6 numbers"),
        ("llama", {"nextn_predict_layers": 6}, "fewer than all blocks"),
        ("gemma4", {}, "has no gemma4.attention.sliding_window_pattern"),
        ("deepseek2", {}, "has no deepseek2.rope.dimension_count"),
        ("lfm2", {"attention.head_count_kv": [0, 1, 2, 0, 1, 2]}, "one number of KV heads, or 0"),
        ("mamba2", {}, "has no mamba2.ssm.conv_kernel"),
    ],
)
def test_wrong_values(tmp_path, architecture, changes, words):
    """The message names the file, the key and the value found."""
    keys = {key: item for key, item in (BASE | changes).items() if item is not None}
    path = written(tmp_path, architecture, keys)
    with pytest.raises(kvcalc.ConfigError) as error:
        kvcalc.size(path, seq=1)
    assert words in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("bert", {}, "covered are afmoe, apertus"),
        ("no such thing", {}, "'no such thing' is not covered"),
        ("llama", {"attention.head_count_kv": [4, 4, 4, 4, 4, 2]}, "in each layer"),
        ("llama", {"attention.value_length": 16}, "keys of another width than values"),
    ],
)
def test_what_is_refused(tmp_path, architecture, changes, words):
    """An architecture, or a shape of one, that is not mapped is refused with the reason."""
    path = written(tmp_path, architecture, BASE | changes)
    with pytest.raises(kvcalc.UnsupportedError) as error:
        kvcalc.size(path, seq=1)
    assert words in str(error.value)


def attempt(content):
    """Size what the bytes say: a report or one of kvcalc's own errors, nothing else."""
    with contextlib.suppress(kvcalc.KvcalcError):
        config, _ = gguf_config.translate(gguf.parse(content, name="x"), name="x")
        for engine in ("model", "llama.cpp"):
            kvcalc.size(config, seq=1, engine=engine)


@given(st.integers(0, len(GOOD)))
def test_files_cut_off(length):
    """A file may end anywhere."""
    attempt(GOOD[:length])


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=9)), max_size=4
    )
)
def test_files_with_other_bytes(changes):
    """Any bytes may be others."""
    content = bytearray(GOOD)
    for place, other in changes:
        content[place : place + len(other)] = other
    attempt(bytes(content))


@given(st.binary(max_size=300))
def test_files_of_any_bytes(tail):
    """Whatever follows the counts."""
    attempt(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + tail)


NUMBERS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2, 4, 8, 64])
ANYTHING = NUMBERS | st.booleans() | st.floats(width=32) | st.text(max_size=5)


@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 99), ANYTHING | st.lists(NUMBERS, max_size=8))),
    dropped=st.lists(st.integers(0, 99), max_size=2),
)
def test_files_with_other_values(name, changes, dropped):
    """Any key may be absent or hold another value, of another type."""
    architecture, keys = FILES[name]
    keys, names = dict(keys), list(keys)
    for place, item in changes:
        keys[names[place % len(names)]] = item
    for place in dropped:
        keys.pop(names[place % len(names)], None)
    attempt(encode(pairs_of(architecture, keys)))


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path):
    """A quarter of a million tokens and half a million merges cost no memory, and a moment."""
    tokens = array(8, 750_000, gguf_files.string("token") * 750_000)
    path = tmp_path / "large.gguf"
    path.write_bytes(encode(pairs_of("llama", BASE) | {"tokenizer.ggml.tokens": tokens}))
    values = gguf.read_metadata(path)
    assert values["tokenizer.ggml.tokens"] is None
    assert values["llama.block_count"] == 6
