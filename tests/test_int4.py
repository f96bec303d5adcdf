"""The running int4 cache: packed storage, a full-precision tail, nothing quantised twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, tiny_config

import kvcalc
from kvcalc.dtypes import storage_format
from kvcalc.layers import FullAttention
from kvcalc.measure.held import held_by_layer
from kvcalc.strategies import load_strategy
from kvcalc.strategies.int4 import packed_tokens
from kvcalc.strategies.int4.cache import Int4Layer
from kvcalc.strategies.int4.cache import build as build_cache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def states(tokens, *, batch=2, heads=3, key_dim=8, value_dim=12, dtype=torch.float32, seed=0):
    """Random keys and values, [batch, heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, key_dim, generator=generator).to(dtype)
    values = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(dtype)
    return keys, values


class Held:
    """A cache of one layer, as the counter wants it."""

    def __init__(self, layer):
        self.layers = [layer]


@settings(deadline=None, max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 23), min_size=1, max_size=12),
    group=st.sampled_from([2, 4]),
    residual=st.integers(0, 17),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_held_is_predicted_after_every_append(chunks, group, residual, dtype):
    """However the tokens arrive, the bytes held are the predicted ones after each arrival."""
    spec = load_strategy(f"int4:group={group},residual={residual}")
    promise = spec.apply(FullAttention(kv_heads=3, key_dim=8, value_dim=12))
    layer = Int4Layer(group=group, residual=residual)
    total = 0
    for tokens in chunks:
        layer.update(*states(tokens, dtype=DTYPES[dtype], seed=total))
        total += tokens
        (held,) = held_by_layer(Held(layer))
        expected = promise.num_bytes(tokens=total, batch=2, dtype=storage_format(dtype))
        assert held.held_bytes == held.logical_bytes == expected
        assert layer.get_seq_length() == total


def test_values_are_really_stored_in_four_bits():
    """The packed tensors are bytes with two values each, beside their scales and minima."""
    layer = Int4Layer(group=4, residual=4)
    layer.update(*states(20))
    assert layer.packed_keys.dtype == layer.packed_values.dtype == torch.uint8
    assert layer.packed_keys.shape == (2, 3, 16, 8 // 2)
    assert layer.packed_values.shape == (2, 3, 16, 12 // 2)
    assert layer.key_scales.shape == layer.key_minima.shape == (2, 3, 16 // 4, 8)
    assert layer.value_scales.shape == layer.value_minima.shape == (2, 3, 16, 12 // 4)


def test_packed_values_are_within_half_a_step():
    """Unpacking gives back each value to half the scale of its group."""
    layer = Int4Layer(group=4, residual=0)
    keys, values = states(32)
    layer.update(keys, values)
    key_steps = layer.key_scales.repeat_interleave(4, dim=2)
    value_steps = layer.value_scales.repeat_interleave(4, dim=3)
    assert ((layer.unpacked_keys() - keys).abs() <= key_steps * 0.5001 + 1e-6).all()
    assert ((layer.unpacked_values() - values).abs() <= value_steps * 0.5001 + 1e-6).all()


def test_constant_groups_come_back_exactly():
    """A group of equal values has scale 0 and is exact."""
    layer = Int4Layer(group=4, residual=0)
    keys, values = torch.full((1, 1, 8, 4), 1.25), torch.full((1, 1, 8, 4), -3.0)
    layer.update(keys, values)
    assert torch.equal(layer.unpacked_keys(), keys)
    assert torch.equal(layer.unpacked_values(), values)


def test_outlier_channels_cost_no_other_channel():
    """A key channel a thousand times larger than the rest leaves their error as it was."""
    keys, values = states(32)
    plain, spiked = Int4Layer(group=4, residual=0), Int4Layer(group=4, residual=0)
    plain.update(keys, values)
    outlier = keys.clone()
    outlier[..., 0] *= 1000
    spiked.update(outlier, values)
    assert torch.equal(plain.unpacked_keys()[..., 1:], spiked.unpacked_keys()[..., 1:])


def test_nothing_packed_is_touched_again():
    """Appending leaves every byte, scale and minimum that was packed before as it was."""
    layer = Int4Layer(group=4, residual=6)
    layer.update(*states(30))
    before = (layer.packed_keys, layer.key_scales, layer.packed_values, layer.value_minima)
    before = [tensor.clone() for tensor in before]
    for step in range(25):
        layer.update(*states(1, seed=step))
    after = (layer.packed_keys, layer.key_scales, layer.packed_values, layer.value_minima)
    for old, new in zip(before, after, strict=True):
        assert new.shape[2] > old.shape[2]
        assert torch.equal(new[:, :, : old.shape[2]], old)


def test_the_tail_is_exact_and_at_least_residual_long():
    """The most recent tokens are kept as they came, never fewer than `residual`."""
    layer = Int4Layer(group=4, residual=6)
    keys, values = states(31)
    layer.update(keys, values)
    assert 6 <= layer.keys.shape[2] < 6 + 4
    assert torch.equal(layer.keys, keys[:, :, -layer.keys.shape[2] :])
    assert torch.equal(layer.values, values[:, :, -layer.values.shape[2] :])


def test_packing_depends_on_the_count_alone():
    """One prefill and the same tokens one by one pack the same bytes."""
    keys, values = states(40)
    at_once, one_by_one = Int4Layer(group=4, residual=5), Int4Layer(group=4, residual=5)
    at_once.update(keys, values)
    for index in range(40):
        one_by_one.update(keys[:, :, index : index + 1], values[:, :, index : index + 1])
    assert torch.equal(at_once.packed_keys, one_by_one.packed_keys)
    assert torch.equal(at_once.packed_values, one_by_one.packed_values)
    assert torch.equal(at_once.key_scales, one_by_one.key_scales)
    assert packed_tokens(40, group=4, residual=5) == at_once.packed_keys.shape[2]


def test_a_prefill_attends_in_full_precision():
    """With an empty cache a step sees its own keys and values exactly, packed or not."""
    layer = Int4Layer(group=4, residual=0)
    keys, values = states(16)
    seen_keys, seen_values = layer.update(keys, values)
    assert torch.equal(seen_keys, keys)
    assert torch.equal(seen_values, values)


def test_a_model_decodes_on_it_close_to_the_full_cache():
    """Logits of a decode step stay near those of DynamicCache, and equal them with no packing."""
    from transformers import DynamicCache

    config = tiny_config("llama", head_dim=16, num_hidden_layers=2)
    model = build(config)
    tokens = torch.randint(0, 64, (2, 65))

    def logits(cache):
        with torch.inference_mode():
            model(input_ids=tokens[:, :64], past_key_values=cache)
            return model(input_ids=tokens[:, 64:], past_key_values=cache).logits

    def int4(residual):
        parameters = {"group": 8, "residual": residual}
        return build_cache(model.config, capacity_tokens=65, parameters=parameters)

    full = logits(DynamicCache(config=model.config))
    assert torch.allclose(logits(int4(residual=100)), full, atol=1e-6)
    error = (logits(int4(residual=8)) - full).abs().max()
    assert 0 < error < 0.05 * full.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen2"])
@pytest.mark.parametrize("prompt", [3, 24, 61])
def test_models_hold_what_is_predicted(model_type, prompt):
    """Full, window and latent layers of real models hold the predicted bytes under int4."""
    overrides = {"kv_lora_rank": 16, "qk_rope_head_dim": 8} if model_type == "deepseek_v3" else {}
    config = tiny_config(model_type, **overrides) | {"dtype": "float32"}
    if "head_dim" in config:
        config["head_dim"] = 16
    model = build(config)
    spec = "int4:group=8,residual=5"
    cache = build_cache(
        model.config, capacity_tokens=prompt + 2, parameters=load_strategy(spec).parameters
    )
    tokens = torch.randint(0, 64, (2, prompt + 2))
    with torch.inference_mode():
        model(input_ids=tokens[:, :prompt], past_key_values=cache)
        for step in tokens[:, prompt:].split(1, dim=1):
            model(input_ids=step, past_key_values=cache)
    report = kvcalc.size(config, seq=prompt + 2, batch=2, engine="transformers", strategy=spec)
    held = [layer.held_bytes for layer in held_by_layer(cache)]
    assert [layer.bytes for layer in report.layers] == held


def test_what_it_cannot_do_is_refused():
    """Rolling back or rearranging packed tokens is refused, and so are rows that do not divide."""
    layer = Int4Layer(group=4, residual=0)
    layer.update(*states(8))
    with pytest.raises(kvcalc.UnsupportedError):
        layer.crop(-1)
    with pytest.raises(kvcalc.UnsupportedError):
        layer.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(kvcalc.UnsupportedError, match="group"):
        Int4Layer(group=32, residual=0).update(*states(8))
