"""Fused attention to packed keys and values: the kernels under Triton's interpreter against
dequantised fp32 attention, and the way a model gets to them and back.

Run as a script with TRITON_INTERPRET=1 this file prints the largest error of each of `POINTS`.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from tiny import build, tiny_config
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcalc.strategies import _packed_attention as packed_attention
from kvcalc.strategies import _plain_attention as plain_attention
from kvcalc.strategies._packed_attention import (
    PackedTokens,
    attend,
    attention,
    fits,
    is_active,
    split_tokens,
    use_fused,
)
from kvcalc.strategies._packed_cache import Packed, packed_cache

LENGTHS = {
    # group: (packed groups, tail tokens); a split has 256 tokens at least.
    32: [(1, 0), (0, 1), (0, 300), (7, 3), (8, 130), (9, 1), (17, 256)],
    16: [(1, 1), (33, 5)],
    64: [(5, 64)],
}

POINTS = [
    *product([1], [4], [64], [32], LENGTHS[32]),
    *product([2], [1, 8], [128], [32], [(9, 130)]),
    *product([2], [3], [(96, 64)], [16], LENGTHS[16]),
    *product([1], [12], [(20, 48)], [16], LENGTHS[16]),
    *product([1], [5], [128], [64], LENGTHS[64]),
    *product([1], [2], [(24, 96)], [32], [(3, 2)]),
]
"""Sequences, queries of a KV head, widths of K and V, tokens of a group, and tokens."""


def tokens_of(states, *, bits, group, tail, per_channel):
    """States [batch, KV heads, tokens, width] with all but `tail` tokens packed."""
    packed, rest = states.split([states.shape[2] - tail, tail], dim=2)
    made = Packed.of(packed, bits=bits, group=group, per_channel=per_channel)
    return PackedTokens(made, rest, bits)


def example(batch, queries, widths, group, tokens, *, bits, dtype=torch.float32, device="cpu"):
    """A query for two KV heads, and their keys and values."""
    generator = torch.Generator().manual_seed(0)
    groups, tail = tokens
    key_dim, value_dim = (widths, widths) if isinstance(widths, int) else widths
    settings = {"bits": bits, "group": group, "tail": tail}
    total = groups * group + tail
    query = torch.randn(batch, 2 * queries, 1, key_dim, generator=generator)
    keys = torch.randn(batch, 2, total, key_dim, generator=generator) + 1
    values = torch.randn(batch, 2, total, value_dim, generator=generator) + 1
    return (
        query.to(device, dtype),
        tokens_of(keys.to(device, dtype), **settings, per_channel=True),
        tokens_of(values.to(device, dtype), **settings, per_channel=False),
    )


def dense(tokens):
    """Tokens dequantised in fp32, whatever the dtype of scales and minima."""
    levels, scales, minima = tokens.packed
    packed = Packed(levels, scales.float(), minima.float())
    return packed_attention.dequantised(packed, tokens.tail.float(), tokens.bits)


def reference(query, key, value, *, scaling):
    """The same in plain PyTorch, computed in fp32: [batch, 1, heads, width]."""
    keys, values = dense(key), dense(value)
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    output = scaled_dot_product_attention(grouped, keys, values, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1)


def error_of(point, *, bits, dtype=torch.float32, device="cpu", settings=None):
    """The largest difference between the kernels and the reference."""
    query, key, value = example(*point, bits=bits, dtype=dtype, device=device)
    assert fits(query, key, value)
    found = attend(query, key, value, scaling=0.3, settings=settings)
    assert found.dtype == dtype
    expected = reference(query, key, value, scaling=0.3)
    assert found.shape == expected.shape
    return (found.float() - expected).abs().max().item()


@pytest.fixture(scope="module")
def errors():
    """What this file prints under the interpreter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed, the kernels are not interpreted")
    triton, numpy = (Version(version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):  # triton-lang/triton#9171
        pytest.skip(f"Triton {triton} cannot interpret with NumPy {numpy}; NumPy < 2.4 can")
    root = Path(__file__).parent.parent
    paths = f"{root}{os.pathsep}{root / 'tests'}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_kernels_attend_as_dequantised_tokens(errors, bits):
    """Around groups and splits, for several heads, widths and sequences, without and with a tail,
    to the rounding of fp32.
    """
    assert len(errors[f"{bits}"]) == len(POINTS)
    assert max(errors[f"{bits}"]) < 1e-5


def test_a_group_is_attended_to_in_blocks(errors):
    """Of the smallest size, where a benchmark asks for it."""
    assert max(errors["blocks"]) < 1e-5


def test_a_model_decodes_by_the_kernels(errors):
    """From the model down to the kernels, in fp32: the same logits."""
    assert errors["logits"] < 1e-4


def test_kernels_round_like_the_dtype(errors):
    """In fp16 the error is that of rounding weights and outputs of up to 4: some half ulps of 1."""
    assert max(errors["fp16"]) < 4 * 2**-11


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("width", [128, 64])
def test_a_compiled_kernel_keeps_up_with_the_memory(monkeypatch, width, bits):
    """For a usual model in bf16 on an H200 it stays in registers; with 4 bits or more of width 128
    it has no more instructions, to a tenth, than are issued while the bytes are read. 16 bits are
    those of the static cache.
    """
    pytest.importorskip("triton", reason="triton is not installed, nothing is compiled")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import compiled_kernels

    kernel, settings, block_tokens = compiled_kernels.attention(bits, width)
    made = compiled_kernels.compiled(kernel, settings)
    assert made.spilled_bytes == 0
    issued = made.loop * settings["num_warps"] / block_tokens
    if width == 128 and bits > 2:
        assert issued < 1.1 * compiled_kernels.issued_while_read(bits, width)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_kernels_attend_on_a_gpu(bits):
    """Compiled they give the same, and bf16 rounds by its 8 bits."""
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not plain_attention.fused_available(device):
        pytest.skip("no GPU with Triton here, the kernels are not compiled")
    for point in POINTS:
        assert error_of(point, bits=bits, device=device) < 1e-4
        assert error_of(point, bits=bits, dtype=torch.bfloat16, device=device) < 2**-5


def llama(**overrides):
    """A tiny model with grouped heads of width 16, and its tokens."""
    return build(tiny_config("llama", head_dim=16, **overrides))


def decode(model, *, bits=4, steps=3, mask=None, mode=torch.inference_mode):
    """Logits of single steps after a prompt of 40 tokens, most of them packed, then of a step of
    two tokens.
    """
    tokens = torch.randint(1, 64, (2, 42 + steps), generator=torch.Generator().manual_seed(2))
    cache = packed_cache(model.config, bits=bits, parameters={"group": 16, "residual": 8})
    chunks = tokens.split([40] + [1] * steps + [2], dim=1)
    with mode():
        outputs = [model(input_ids=chunks[0], past_key_values=cache)]
        for step in chunks[1:]:
            seen = cache.get_seq_length() + step.shape[1]
            attention_mask = mask and torch.ones(2, seen, dtype=torch.long)
            if mask:
                attention_mask[0, :3] = 0
            outputs.append(
                model(input_ids=step, past_key_values=cache, attention_mask=attention_mask)
            )
    return torch.cat([output.logits for output in outputs], dim=1)


@pytest.fixture
def on_cpu(monkeypatch):
    """The fused way, open on a CPU: the reference in place of the kernels."""
    monkeypatch.setattr(plain_attention, "fused_available", lambda device: True)
    monkeypatch.setattr(packed_attention, "attend", reference)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_model_decodes_the_same_with_and_without(on_cpu, bits, mode):
    """Single steps are fused in every layer, the prompt and a step of two tokens are not."""
    model = llama()
    expected = decode(model, bits=bits, mode=mode)
    with use_fused(model) as calls:
        found = decode(model, bits=bits, mode=mode)
    assert calls == {"fused": 4 * 3, "sdpa": 4 * 2}
    assert (found - expected).abs().max() < 1e-4


def test_masked_tokens_are_not_fused(on_cpu):
    """With padding the tokens are dequantised as before."""
    model = llama()
    expected = decode(model, mask=True)
    with use_fused(model) as calls:
        found = decode(model, mask=True)
    assert calls["fused"] == 0
    assert torch.equal(found, expected)


SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.0] * 6,
    "vocab_size_per_layer_input": 64,
}


@pytest.mark.parametrize(
    ("model_type", "overrides", "layers"),
    [
        ("gemma3_text", {}, 1),  # five layers of six have windows
        ("gemma3n_text", SHARED, 3),  # the last layers attend to K and V of those before
        ("qwen3_next", {}, 1),  # every fourth layer attends, the others keep states
        ("gemma2", {}, 0),  # softcapping: it attends in its own way
        ("gpt_oss", {}, 0),  # sinks: likewise
        # What is kept are latents, projected up before they are attended to.
        ("deepseek_v3", {"qk_rope_head_dim": 16}, 0),
        # An indexer chooses tokens, by a mask that is made for `sdpa` alone.
        ("deepseek_v32", {"qk_rope_head_dim": 16, "index_topk": 6}, 0),
    ],
)
def test_other_models_decode_the_same(on_cpu, model_type, overrides, layers):
    """Where the fused way does not cover an attention the tokens come dequantised, whoever reads
    them.
    """
    width = {} if "deepseek" in model_type else {"head_dim": 16}
    model = build(tiny_config(model_type, num_hidden_layers=6, **width, **overrides))
    expected = decode(model)
    with use_fused(model) as calls:
        found = decode(model)
    assert calls["fused"] == layers * 3
    assert (found - expected).abs().max() < 1e-4


def test_the_implementation_is_restored(on_cpu):
    """After an error, too; and a model that attends in another way keeps it."""
    model = llama()
    with use_fused(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        assert is_active()
    with pytest.raises(IndexError), use_fused(model):
        model(input_ids=torch.tensor([[10_000]]))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not is_active()
    model.set_attn_implementation("eager")
    with use_fused(model) as calls:
        assert not is_active()
        decode(model)
    assert not calls


def test_without_cuda_nothing_is_switched():
    """On a CPU a model attends as before."""
    model = llama()
    assert not plain_attention.fused_available(torch.device("cpu"))
    with use_fused(model) as calls:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        assert not is_active()
        decode(model)
    assert not calls


@pytest.mark.parametrize(
    ("release", "capability", "expected"),
    [
        ("3.6.0", (9, 0), True),
        ("3.10.0+git1a2b", (8, 0), True),
        ("3.4.0", (9, 0), False),
        ("3.6.0", (7, 5), False),
    ],
)
def test_an_old_triton_or_gpu_is_left_alone(monkeypatch, release, capability, expected):
    """Before 3.5 Triton refuses the kernel, before Ampere there is no bf16."""
    monkeypatch.setattr(metadata, "version", lambda name: release)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(plain_attention, "has_flash", plain_attention.has_flash.__wrapped__)
    available = plain_attention.fused_available.__wrapped__
    assert available(torch.device("cuda")) is expected


class Module(torch.nn.Module):
    """An attention module as attention functions know it."""

    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, True),
        ({"scaling": 0.5}, True),
        ({"position_ids": torch.zeros(1), "use_cache": True, "sliding_window": None}, True),
        ({"dropout": 1e-9}, False),
        ({"attention_mask": torch.ones(2, 1, 1, 37, dtype=torch.bool)}, False),
        ({"sliding_window": 100}, False),
        ({"position_bias": torch.zeros(2, 4, 1, 37)}, False),
        ({"never_heard_of": 1}, False),
    ],
)
def test_what_is_more_than_plain_attention_is_left_to_sdpa(on_cpu, arguments, fused):
    """Both ways give the same; an argument that nobody here knows is not ignored."""
    query, key, value = example(2, 2, 16, 16, (2, 5), bits=4)
    plain_attention.calls.clear()
    mask = {"attention_mask": None} | arguments
    found, _ = attention(Module(), query, key, value, **mask)
    assert plain_attention.calls == {"fused" if fused else "sdpa": 1}
    scaling = arguments.get("scaling", 16**-0.5)
    assert torch.allclose(found, reference(query, key, value, scaling=scaling), atol=1e-5)


def test_softcapping_and_sinks_reach_the_function_that_was_asked(on_cpu):
    """`sdpa` refuses softcapping in its own words, as without us."""
    query, key, value = example(1, 2, 16, 16, (2, 5), bits=4)
    with pytest.raises(ValueError, match="softcap"):
        attention(Module(), query, key, value, None, softcap=30.0)
    plain_attention.calls.clear()
    attention(Module(), query, key, value, None, s_aux=torch.zeros(4))
    assert plain_attention.calls == {"sdpa": 1}


@pytest.mark.parametrize(
    ("queries", "widths", "group", "why"),
    [
        (2, 24, 24, "a group of 24 tokens"),
        (2, 24, 8, "a group of 8 tokens"),
        (2, (18, 16), 16, "18 channels of K"),
        (2, 512, 32, "512 channels"),
        (2, (16, 512), 32, "512 channels of V"),
    ],
)
def test_shapes_that_do_not_fit_are_left_to_sdpa(queries, widths, group, why):
    """The kernels take groups of 16, 32, 64 tokens, and heads of up to 256 channels in fours."""
    assert not fits(*example(1, queries, widths, group, (1, 1), bits=4)), why


def test_packed_tokens_are_tensors():
    """Whatever computes with them sees the dequantised tokens; their shape costs nothing."""
    _, key, _ = example(1, 2, 16, 4, (2, 5), bits=4)
    assert key.shape == (1, 2, 13, 16)
    assert key.dtype == torch.float32
    for found, expected in (
        (key + 1, key.made() + 1),
        (key.transpose(1, 2), key.made().transpose(1, 2)),
        (torch.cat([key, key]), torch.cat([key.made()] * 2)),
        (key[:, :, -3:], key.made()[:, :, -3:]),
    ):
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_every_token_is_in_one_split():
    """For any tail, groups and heads, and no split is empty."""
    for tail, groups, group, heads in product(
        (0, 1, 255, 9_999), (0, 1, 9, 4092), (16, 32), (1, 8, 99)
    ):
        splits = split_tokens(tail=tail, groups=groups, group=group, heads=heads)
        for total, size, count in (
            (tail, splits.tail_tokens, splits.tail),
            (groups, splits.groups, splits.packed),
        ):
            assert (count - 1) * size < total <= count * size or total == count == 0
        per_head = splits.tail + splits.packed
        most = packed_attention.MOST_PROGRAMS
        assert heads * per_head <= most + heads


def main():
    """Print the errors as JSON."""
    found = {bits: [error_of(point, bits=bits) for point in POINTS] for bits in (8, 4, 2)}
    found["blocks"] = [error_of(POINTS[4], bits=bits, settings={"BLOCK": 16}) for bits in (8, 4, 2)]
    # NumPy, which the interpreter computes with, has no bf16.
    found["fp16"] = [
        error_of(point, bits=bits, dtype=torch.float16) for bits in (8, 4, 2) for point in POINTS
    ]
    model = llama()
    expected = decode(model)
    plain_attention.fused_available = lambda device: True
    with use_fused(model) as calls:
        found["logits"] = (decode(model) - expected).abs().max().item()
    assert calls["fused"]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
