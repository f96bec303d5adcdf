"""Quantisations that config.json does not tell: hf_quant_config.json beside it, and names."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc.cli import run
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.origin import Origin
from kvcalc.sources import catalogue, quantization, resolve
from kvcalc.sources.checkpoint import weights_of_model
from kvcalc.weights import weights_of

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LINEAR = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
NUM_LINEAR = 2 * 7
PLAIN = weights_of(CONFIG).num_bytes
FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
NVFP4 = {
    "quant_algo": "NVFP4",
    "kv_cache_quant_algo": None,
    "group_size": 16,
    "exclude_modules": ["lm_head"],
}


def said(inner):
    """A file as ModelOpt writes it."""
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}


def save(folder, beside=None, **changes):
    """A model folder without weights; `beside` is the content of its hf_quant_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if beside is not None:
        text = beside if isinstance(beside, str) else json.dumps(beside)
        (folder / "hf_quant_config.json").write_text(text)
    return folder


def cached(home, name, beside=None):
    """The same in the local Hugging Face cache."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return save(repository / "snapshots" / ("0" * 40), beside)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """The local cache of these tests is theirs, and empty."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def found(model):
    """The weights of a model as `fit` takes them."""
    return weights_of_model(*resolve(str(model)))


@pytest.mark.parametrize(
    ("inner", "quantised", "name"),
    [
        (FP8, LINEAR + NUM_LINEAR * 8, "fp8"),
        (NVFP4, LINEAR // 2 + LINEAR // 16 + NUM_LINEAR * 8, "nvfp4"),
    ],
)
@pytest.mark.parametrize("place", ["folder", "config.json", "hf-cache"])
def test_weights_follow_the_file_beside(tmp_path, home, inner, quantised, name, place):
    """A folder and a cached model are weighed as hf_quant_config.json says, and say so."""
    folder = save(tmp_path / "model", said(inner))
    model = {"folder": folder, "config.json": folder / "config.json", "hf-cache": "org/m"}[place]
    cached(home, "org/m", said(inner))
    weights = found(model)
    assert (weights.num_bytes, weights.format) == (PLAIN - 2 * LINEAR + quantised, name)
    assert quantization.NOTE in resolve(str(model))[1].notes


def test_the_kv_dtype_follows_the_file_beside(tmp_path):
    """`auto` is the KV dtype that hf_quant_config.json names, as vLLM takes it."""
    plain = kvcalc.size(save(tmp_path / "a"), seq=512)
    eight = kvcalc.size(save(tmp_path / "b", said(FP8)), seq=512)
    other = kvcalc.size(save(tmp_path / "c", said(NVFP4)), seq=512)
    assert plain.total_bytes == 2 * eight.total_bytes == other.total_bytes
    assert quantization.NOTE in eight.notes


def test_a_flat_file_is_read(tmp_path):
    """The fields may stand at the top, as vLLM reads them, too."""
    assert found(save(tmp_path / "a", FP8)) == found(save(tmp_path / "b", said(FP8)))


@pytest.mark.parametrize(
    "own",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {}},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"bits": 4, "group_size": 64}},
    ],
)
def test_the_configs_own_quantisation_goes_first(tmp_path, own):
    """Where config.json says it, hf_quant_config.json is not even read, as in vLLM."""
    config, origin = resolve(str(save(tmp_path / "model", "no JSON", **own)))
    assert config == CONFIG | own
    assert origin.notes == ()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["quant_algo", "producer", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    own=VALUES.filter(lambda value: value is not None),
    said=st.dictionaries(
        st.sampled_from(["quantization", "producer", "quant_algo", "kv_cache_quant_algo"]), VALUES
    ),
    nested=st.booleans(),
)
def test_merging_never_changes_a_config_that_says_it(own, said, nested):
    """A config with a quantization_config, of its own or its text part's, stays what it was."""
    config = CONFIG | {"quantization_config": own}
    if nested:
        config = {"model_type": "llava", "text_config": config}
    before = json.dumps(config)
    assert quantization.merged(config, said, name="x") is config
    assert json.dumps(config) == before


@given(
    said=st.dictionaries(
        st.sampled_from(["quantization", "producer", "quant_algo", "kv_cache_quant_algo"]), VALUES
    )
)
def test_merging_adds_one_field_or_is_an_error(said):
    """Whatever the file holds, the config's other fields stay, or one line says what is wrong."""
    merged = {}
    with suppress(ConfigError):
        merged = dict(quantization.merged(CONFIG, said, name="x"))
    if merged:
        assert isinstance(merged.pop("quantization_config"), dict)
        assert merged == CONFIG


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("\0" * (16 * 2**20 + 1), "which no hf_quant_config.json is"),
        ({}, "has no quant_algo"),
        ({"quantization": {}}, "has no quant_algo"),
        ({"quantization": 3}, "quantization = 3, not an object"),
        ({"quantization": None}, "quantization = None, not an object"),
        ({"quantization": FP8 | {"quant_algo": 8}}, "quant_algo = 8, not a name"),
        ({"quantization": FP8 | {"kv_cache_quant_algo": []}}, "kv_cache_quant_algo = "),
        ({"quantization": FP8, "producer": "modelopt"}, "producer = 'modelopt', not an object"),
        ({"quantization": FP8, "producer": {"name": 1}}, "producer.name = 1, not a name"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, beside, words):
    """A file that is damaged or of other types ends `size` with one line that names it, and 2."""
    assert run(["size", str(save(tmp_path / "model", beside)), "--seq", "512"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert words in told
    assert told.count("kvcalc:") == 1


@pytest.mark.parametrize("key", ["exclude_modules", "group_size"])
def test_bad_fields_of_weights_are_one_line(tmp_path, key):
    """What only weights need is checked when they are counted."""
    folder = save(tmp_path / "model", said(NVFP4 | {key: {"a": 1}}))
    with pytest.raises(InputError, match=f"quantization_config.{key} is"):
        found(folder)


@pytest.mark.parametrize(
    "inner",
    [
        NVFP4 | {"group_size": 32},
        NVFP4 | {"exclude_modules": None},
        {"quant_algo": "NVFP4", "exclude_modules": []},
        FP8 | {"exclude_modules": None},
        FP8 | {"quant_algo": "W4A8_AWQ"},
        FP8 | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}},
        FP8 | {"quant_algo": "MIXED_PRECISION"},
        FP8 | {"quant_algo": None},
    ],
)
def test_files_that_leave_bytes_open_are_refused(tmp_path, inner):
    """A format that is not known, or not said whole, is refused and never weighed as bf16."""
    folder = save(tmp_path / "model", said(inner))
    with pytest.raises(UnsupportedError, match="deciding field: quantization_config"):
        found(folder)


def test_another_producers_file_is_no_modelopt(tmp_path):
    """A file of another producer keeps its name, whose formats are not known."""
    folder = save(tmp_path / "model", said(FP8) | {"producer": {"name": "other"}})
    with pytest.raises(UnsupportedError, match="quant_algo"):
        found(folder)


def test_a_link_to_nothing_is_told(tmp_path):
    """A cached file whose content was deleted is an error, as the model is not a plain one."""
    folder = save(tmp_path / "model")
    (folder / "hf_quant_config.json").symlink_to("gone")
    with pytest.raises(ConfigError, match="cannot read"):
        resolve(str(folder))


# names


def named(name):
    """What a name of a model on the Hub says."""
    return quantization.named(Origin(requested=name, resolved=name, kind="hub", detail=""))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "FP8"),
        ("nvidia/Qwen3-235B-A22B-NVFP4", "NVFP4"),
        ("org/Qwen3-8B-NVFP4A16", "NVFP4A16"),
        ("org/Llama-3.1-8B-FP8-dynamic", "FP8"),
        ("org/model.mxfp4", "mxfp4"),
        ("org/model_MXFP8", "MXFP8"),
        ("org/DeepSeek-FP4", "FP4"),
        ("org/Qwen2.5-7B-Instruct-AWQ", "AWQ"),
        ("org/Qwen2.5-7B-Instruct-GPTQ-Int4", "GPTQ"),
        ("org/Qwen3-8B-int8", "int8"),
        ("RedHatAI/Llama-quantized.w4a16", "w4a16"),
        ("RedHatAI/Llama-quantized.w8a8", "w8a8"),
        ("org/DeepSeek-R1-W4AFP8", "W4AFP8"),
        ("unsloth/Qwen3-8B-bnb-4bit", "bnb"),
        ("mlx-community/Qwen3-8B-4bit", "4bit"),
        ("org/Qwen3-8B-8-bit", "8-bit"),
        ("org/Qwen3-8B-nf4", "nf4"),
    ],
)
def test_names_that_say_a_quantised_format(name, word):
    """A format's name as a word of its own in the last part of a model's name."""
    assert named(name) == word


@pytest.mark.parametrize(
    "name",
    [
        "openai/gpt-oss-20b",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "deepseek-ai/DeepSeek-V3",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "org/model-fp16",
        "org/model-fp32",
        "google/gemma-3-27b-it-qat-q4_0-unquantized",
        "google/gemma-3-27b-it-qat-int4-unquantized",
        "org/DeepSeek-V3-FP8-to-BF16",
        "org/DeepSeek-V3-FP8-dequantized",
        "fp8-lab/Llama-3-8B",
        "org/int4tune-7B",
        "org/Hawq-7B",
        "org/mint4-8b",
        "org/Orbit-4bites",
        "org/wa4a8",
        "org/model-w4",
        "org/Qwen3-4B",
        "org/128bit",
        "",
    ],
)
def test_names_that_say_none(name):
    """Words that only contain one, plain dtypes, and what was quantised once say nothing."""
    assert named(name) == ""


@given(st.text(alphabet="fpnvmx48awbit-_.", max_size=5000))
def test_any_name_is_read(name):
    """No name takes long or fails."""
    assert named(name) in name


@pytest.mark.parametrize("given", ["folder", "config.json", "copy", "snapshot", "."])
def test_a_name_without_a_quantisation_is_refused(tmp_path, monkeypatch, given):
    """A folder, file or snapshot whose name says a format, and whose config none, is not bf16."""
    folder = save(tmp_path / "Llama-NVFP4")
    copy = folder.rename(tmp_path / "x") if given == "copy" else None
    if copy:
        folder = (copy / "config.json").rename(tmp_path / "Llama-NVFP4.json")
    if given == "snapshot":
        folder = save(tmp_path / "models--org--Llama-NVFP4" / "snapshots" / "abc")
    if given == ".":
        monkeypatch.chdir(folder)
    model = {"config.json": folder / "config.json", ".": "."}.get(given, folder)
    with pytest.raises(UnsupportedError, match=r"says NVFP4, its config no quantisation"):
        found(model)
    report = kvcalc.size(model, seq=512)
    assert any("the name says NVFP4" in note for note in report.notes)
    told = kvcalc.fit(model, gpu="h100-sxm-80gb", reserve="2GiB", seq=512, weights="1GB")
    assert told.weights_bytes == 10**9


def test_fit_refuses_it_in_one_line(tmp_path, capsys):
    """`fit` ends with 3 and what to give instead, told once."""
    folder = save(tmp_path / "Llama-NVFP4")
    assert run(["fit", str(folder), "--gpu", "h100-sxm-80gb", "--reserve", "2GiB"]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("--weights") == 1
    assert "hf_quant_config.json" in told


def test_files_of_weights_need_no_name(tmp_path):
    """Files are counted as they are, whatever the folder is called."""
    import torch
    from safetensors.torch import save_file

    folder = save(tmp_path / "Llama-NVFP4")
    save_file({"a": torch.zeros(7, dtype=torch.uint8)}, folder / "model.safetensors")
    assert found(folder).num_bytes == 7


def test_a_mapping_has_no_name():
    """A config that the caller gives is taken by its word, wherever it was saved."""
    config = CONFIG | {"_name_or_path": "org/Llama-NVFP4"}
    assert weights_of_model(*resolve(config)).num_bytes == PLAIN


def test_the_catalogue_contradicts_no_name():
    """No entry whose name says a quantised format is without it."""
    for entry in catalogue.entries():
        origin = resolve(entry.name)[1]
        assert not quantization.contradicted(entry.config, origin), entry.name


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("nvidia/Qwen3-235B-A22B-NVFP4", 134_101_651_392),
        ("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", 18_873_122_408),
        ("nvidia/GLM-5-NVFP4", None),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", None),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", None),
        ("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8", None),
    ],
)
def test_catalogued_exports_of_modelopt(name, num_bytes):
    """Entries with hf_quant_config.json keep an fp8 cache, and are weighed by it or refused."""
    assert kvcalc.size(name, seq=1024).kv_dtype == "fp8"
    if num_bytes:
        assert found(name).num_bytes == num_bytes
    else:
        with pytest.raises(UnsupportedError):
            found(name)


def test_an_entry_is_added_with_the_file_beside(tmp_path, monkeypatch):
    """`add_model.py --quantization` keeps what the weights need, and an expert's lines once."""
    add_model = pytest.importorskip("add_model")
    monkeypatch.setattr(add_model, "MODELS", tmp_path / "models")
    moe = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    four = {"quant_algo": "NVFP4", "group_size": 16}
    name = "model.layers.1.block_sparse_moe.experts"
    layers = {f"{name}.{number}.up_proj": four for number in range(3)}
    layers |= {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}}
    inner = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder = save(tmp_path / "model", said(inner), **moe)
    beside = folder / "hf_quant_config.json"
    arguments = [folder / "config.json", "--quantization", beside, "--name", "a/b", "--source", "c"]
    add_model.main([str(one) for one in arguments])
    entry = json.loads((tmp_path / "models" / "a" / "b.json").read_text("utf-8"))["config"]
    assert len(entry["quantization_config"]["quantized_layers"]) == 2
    assert weights_of(entry) == found(folder)


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_quantisations_of_others_are_refused(key):
    """Fields of compressed-tensors before 0.6 and of MLX are not passed over as bf16."""
    with pytest.raises(UnsupportedError, match=f"deciding field: {key}"):
        weights_of(CONFIG | {key: {"bits": 4}})


def test_a_dtype_of_a_config_that_is_not_plain_is_one_line():
    """What the config says and cannot be is told with what a user can do."""
    with pytest.raises(ConfigError, match=r"torch_dtype 'float8' is no plain dtype .* --weights"):
        weights_of(CONFIG | {"torch_dtype": "float8"})
