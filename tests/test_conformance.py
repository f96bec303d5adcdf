"""The proof of `engine="transformers"`: real models, run, and the storages they hold counted."""

import json

import pytest
import torch
from tiny import WINDOW, build, tiny_config
from transformers import AutoConfig, DynamicCache

import kvcalc
from kvcalc.config import class_defaults
from kvcalc.engines import transformers as engine
from kvcalc.families import families, mha
from kvcalc.measure.held import held_by_layer

RUNNABLE = sorted(name for name in families() if class_defaults(name))

BELOW, AT, ABOVE = (3, 2), (WINDOW - 1, 1), (3 * WINDOW, 2)


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


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_every_claimed_type_holds_what_is_predicted(model_type):
    """A run of the real model holds the predicted bytes in each layer, around every window."""
    config = tiny_config(model_type)
    for dtype, name, batch in ((torch.float32, "fp32", 1), (torch.bfloat16, "bf16", 3)):
        model = build(config, dtype)
        for prompt, decode in (BELOW, AT, ABOVE):
            _, held = run(model, prompt=prompt, decode=decode, batch=batch)
            report = kvcalc.size(
                config, seq=prompt + decode, batch=batch, kv_dtype=name, engine="transformers"
            )
            assert [layer.bytes for layer in report.layers] == held
            assert report.total_bytes == sum(held) > 0


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_a_saved_config_is_the_same_model(model_type):
    """As transformers saves it, with or without defaults, or as its object: the same layers."""
    config = tiny_config(model_type)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    saved = AutoConfig.for_model(model_type, **fields)
    layers = kvcalc.size(config, seq=50, kv_dtype="bf16").layers
    for form in (json.loads(saved.to_json_string()), saved.to_dict(), saved):
        assert kvcalc.size(form, seq=50, kv_dtype="bf16").layers == layers


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


def test_unknown_wrappers_are_refused():
    """A text_config alone says nothing of what its wrapper caches besides it."""
    with pytest.raises(kvcalc.UnsupportedError, match="kimi_vl"):
        kvcalc.size({"model_type": "kimi_vl", "text_config": tiny_config("deepseek_v3")}, seq=10)


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
    monkeypatch.setattr(engine, "version", lambda: "5.14.1")
    report = kvcalc.size(config, seq=10, kv_dtype="fp32", engine="transformers")
    assert report.total_bytes == 4 * 10 * 4 * (12 + 12) * 4


def test_a_type_that_transformers_lacks_is_refused():
    """Kimi K2 runs its repository's own code, so no transformers size is claimed for it."""
    with pytest.raises(kvcalc.UnsupportedError, match="kimi_k2"):
        kvcalc.size("moonshotai/Kimi-K2-Instruct", seq=10, engine="transformers")
