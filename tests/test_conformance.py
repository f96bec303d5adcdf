"""The proof of `engine="transformers"`: real models, run, and the storages they hold counted."""

import copy
import json

import pytest
import torch
import zoo
from tiny import WINDOW, build, tiny_config
from transformers import AutoConfig, DynamicCache
from transformers.models.auto import modeling_auto

import kvcalc
from kvcalc import releases
from kvcalc.families import mha
from kvcalc.measure.held import held_by_layer


def run(model, *, prompt, decode, batch):
    """Prefill and decode one token at a time; the cache after each of the two phases."""
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(0, 64, (batch, prompt + decode))
    with torch.inference_mode():
        model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True)
        after_prefill = [layer.held_bytes for layer in held_by_layer(cache)]
        for step in tokens[:, prompt:].split(1, dim=1):
            model(input_ids=step, past_key_values=cache, use_cache=True)
    return after_prefill, [layer.held_bytes for layer in held_by_layer(cache)]


MAPPED = sorted(zoo.model_types())

NOT_SIZED = {
    ("causal", "blt"): "two byte-level models around a global one that is never cached",
    ("causal", "reformer"): "hidden states and hash buckets instead of K and V",
    ("causal", "xlnet"): "memories of hidden states",
    ("itt", "unlimited_ocr"): "the whole prompt, and a window of what is decoded",
}
"""Types that run and are refused, with the reason."""

BELOW, AT, ABOVE = (3, 2), (WINDOW - 1, 1), (3 * WINDOW, 2)
SETTINGS = [
    (torch.float32, "fp32", 1, ABOVE),
    (torch.bfloat16, "bf16", 3, BELOW),
    (torch.bfloat16, "bf16", 3, AT),
    (torch.float32, "fp32", 1, BELOW),
    (torch.float32, "fp32", 1, AT),
    (torch.bfloat16, "bf16", 3, ABOVE),
]


def architectures(case):
    """The class that the mapping names, as a published config would have it."""
    named = getattr(modeling_auto, zoo.MAPPINGS[case.mapping][0])[case.model_type]
    return [named if isinstance(named, str) else named[0]]


def sized(case, *, seq, batch, kv_dtype):
    """Bytes of each layer as kvcalc has them; layers at the end that hold nothing are left out."""
    report = kvcalc.size(
        case.config | {"architectures": architectures(case)},
        seq=seq,
        batch=batch,
        kv_dtype=kv_dtype,
        engine="transformers",
        encoder_seq=case.encoder_tokens or None,
    )
    return without_empty_end([layer.bytes for layer in report.layers])


def without_empty_end(layers):
    """A cache may have places for more layers than its decoder has; they stay empty."""
    while layers and not layers[-1]:
        layers = layers[:-1]
    return layers


@pytest.mark.parametrize(("mapping", "model_type"), MAPPED)
def test_every_type_holds_what_is_predicted(mapping, model_type, request, record_conformance):
    """A run of the real model holds the predicted bytes in each layer, around every window, in
    every variation of heads, layers and kinds.
    """
    full_run = request.config.getoption("--full")
    outcome = "not buildable"
    if (mapping, model_type) not in zoo.NOT_BUILDABLE:
        for number, case in enumerate(zoo.cases(mapping, model_type)):
            settings = SETTINGS if full_run else SETTINGS[: 3 if number == 0 else 1]
            for dtype, name, batch, (prompt, decode) in settings:
                if dtype == torch.bfloat16 and model_type in zoo.FP32_ONLY:
                    continue
                point = {"seq": prompt + decode, "batch": batch, "kv_dtype": name}
                if (mapping, model_type) in NOT_SIZED:
                    outcome = "refused"
                    with pytest.raises(kvcalc.UnsupportedError, match="deciding field"):
                        sized(case, **point)
                    continue
                model = zoo.build(case, dtype)
                held = zoo.run(model, case, prompt=prompt, decode=decode, batch=batch)
                expected = without_empty_end(list(held.layers))
                assert sized(case, **point) == expected, (case.variation, name, prompt)
                outcome = "exact"
    record_conformance(mapping, model_type, outcome)


def test_almost_every_type_is_exact():
    """At least 95 of a hundred types that can be built are sized; the others are listed here."""
    buildable = [pair for pair in MAPPED if pair not in zoo.NOT_BUILDABLE]
    assert len(NOT_SIZED) <= 0.05 * len(buildable)
    assert NOT_SIZED.keys() <= set(buildable)


@pytest.mark.parametrize(("mapping", "model_type"), MAPPED)
def test_a_saved_config_is_the_same_model(mapping, model_type):
    """As transformers saves it or as its object: the same layers."""
    if (mapping, model_type) in NOT_SIZED.keys() | zoo.NOT_BUILDABLE.keys():
        pytest.skip("not sized")
    for case in zoo.cases(mapping, model_type):
        fields = {key: value for key, value in case.config.items() if key != "model_type"}
        try:
            saved = AutoConfig.for_model(model_type, **copy.deepcopy(fields))
        except (TypeError, ValueError) as error:
            pytest.skip(f"no configuration object: {error}"[:80])
        point = {"seq": 50, "batch": 1, "kv_dtype": "bf16"}
        layers = sized(case, **point)
        for form in (json.loads(saved.to_json_string()), saved.to_dict()):
            assert sized(case._replace(config=form), **point) == layers, case.variation


VARIATIONS = {
    "multi-head": ("llama", {"num_key_value_heads": None}),
    "multi-query": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 2}),
    "explicit head_dim": ("qwen3", {"head_dim": 24, "num_hidden_layers": 3}),
    "no head_dim": ("llama", {"head_dim": None}),
    "window off": ("mistral", {"sliding_window": None}),
    "window left to the class": ("gemma2", {"layer_types": None, "num_hidden_layers": 5}),
    "pattern of three": ("gemma3_text", {"sliding_window_pattern": 3, "num_hidden_layers": 7}),
    "pattern left to the class": ("gemma3_text", {"num_hidden_layers": 13}),
    "listed layer types": (
        "gpt_oss",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
    ),
    "window switched off": ("qwen2", {"use_sliding_window": False, "max_window_layers": 1}),
    "window switched on": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "window of an MoE on": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
    "window of Qwen3 MoE on": ("qwen3_moe", {"use_sliding_window": True}),
    "wide latent": ("deepseek_v3", {"kv_lora_rank": 24, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize(("model_type", "overrides"), VARIATIONS.values(), ids=VARIATIONS)
def test_variations_hold_what_is_predicted(model_type, overrides):
    """Heads, windows and patterns that a config may set otherwise are followed to the byte."""
    config = tiny_config(model_type, **overrides)
    prompt, decode = ABOVE
    _, held = run(build(config), prompt=prompt, decode=decode, batch=2)
    report = kvcalc.size(
        config, seq=prompt + decode, batch=2, kv_dtype="fp32", engine="transformers"
    )
    assert [layer.bytes for layer in report.layers] == held


@pytest.mark.parametrize("model_type", sorted(mha.MODEL_TYPES))
@pytest.mark.parametrize("fields", [{"num_key_value_heads": 1}, {"head_dim": 16}], ids=repr)
def test_fields_that_old_types_ignore_are_refused(model_type, fields):
    """Grouped heads or a head width in a type that knows neither would be read two ways."""
    with pytest.raises(kvcalc.UnsupportedError, match="head_dim"):
        kvcalc.size(tiny_config(model_type) | fields, seq=10)


def test_the_dtype_of_the_whole_comes_first():
    """A wrapper's dtype is the one its text part is loaded in, whatever the text part says."""
    config = {
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": tiny_config("gemma3_text", dtype="float32"),
    }
    assert kvcalc.size(config, seq=10).kv_dtype == "bf16"


def test_a_decoder_is_found_wherever_it_is_nested():
    """A wrapper that transformers does not know is its text decoder, at any depth."""
    text = tiny_config("deepseek_v3")
    wrapped = {"model_type": "kimi_vl", "text_config": text}
    deeper = {"model_type": "some_omni", "thinker_config": wrapped}
    layers = kvcalc.size(text, seq=10).layers
    assert kvcalc.size(wrapped, seq=10).layers == kvcalc.size(deeper, seq=10).layers == layers


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss"])
def test_a_long_prefill_pins_the_prompt(model_type):
    """Right after a prefill past the window the whole prompt is alive, and is reported apart."""
    config = tiny_config(model_type)
    prompt = 5 * WINDOW
    after_prefill, held = run(build(config), prompt=prompt, decode=1, batch=1)
    report = kvcalc.size(config, seq=prompt, kv_dtype="fp32", engine="transformers")
    assert report.transients == {"after_prefill_bytes": sum(after_prefill)}
    assert sum(held) < sum(after_prefill)


def test_a_wrapped_decoder_is_the_decoder():
    """A text_config inside a multimodal config is sized like the same config on its own."""
    text = tiny_config("gemma3_text")
    wrapped = {"model_type": "gemma3", "text_config": text, "dtype": "float32"}
    alone = kvcalc.size(text | {"dtype": "float32"}, seq=100)
    assert kvcalc.size(wrapped, seq=100).layers == alone.layers


def test_versions_before_the_latent_cache_store_every_head(monkeypatch):
    """Before 5.15 transformers stored expanded keys and values: 4 heads × (12 K + 12 V) here."""
    config = tiny_config("deepseek_v3")
    monkeypatch.setattr(releases, "transformers_version", lambda: "5.14.1")
    report = kvcalc.size(config, seq=10, kv_dtype="fp32", engine="transformers")
    assert report.total_bytes == 4 * 10 * 4 * (12 + 12) * 4


def test_what_an_older_release_keeps_otherwise_is_told(monkeypatch):
    """Latents beside an indexer are expanded before 5.18, other states of Qwen4 are refused before
    5.21, with what to install.
    """
    config = tiny_config("deepseek_v32")
    kept = kvcalc.size(config, seq=10, kv_dtype="fp32", engine="transformers").total_bytes
    monkeypatch.setattr(releases, "transformers_version", lambda: "5.17.0")
    expanded = kvcalc.size(config, seq=10, kv_dtype="fp32", engine="transformers").total_bytes
    assert expanded - kept == 4 * 10 * (4 * (12 + 12) - (16 + 8)) * 4
    with pytest.raises(kvcalc.UnsupportedError, match=r"pip install 'transformers>=5\.21'"):
        sized(zoo.cases("causal", "qwen4_exp")[0], seq=10, batch=1, kv_dtype="fp32")


def test_a_type_that_transformers_lacks_is_refused():
    """Kimi K2 runs its repository's own code, so no transformers size is claimed for it."""
    with pytest.raises(kvcalc.UnsupportedError, match="kimi_k2"):
        kvcalc.size("moonshotai/Kimi-K2-Instruct", seq=10, engine="transformers")
