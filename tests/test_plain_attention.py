"""Attention without a mask to what came before: the kernels of a step of a static cache under
Triton's interpreter, and models that attend through them against transformers' own SDPA.

Run as a script with TRITON_INTERPRET=1 this file prints the largest error of each of `POINTS`.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_graph import decoded, strict_capture
from tiny import build, tiny_config
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcalc.measure.session import undisturbed
from kvcalc.strategies import _plain_attention as plain
from kvcalc.strategies import load_strategy
from kvcalc.strategies._plain_attention import (
    CausalMask,
    attend,
    attend_lower_right,
    attending,
    attention,
    causal_mask,
    fits,
    split_tokens,
)

POINTS = [
    # Splits have 128 tokens, blocks 16 in fp32 and 64 in fp16.
    *product([1], [2], [64], [130], [1, 15, 16, 17, 127, 128, 129, 130]),
    *product([2], [1, 4, 8], [128], [300], [1, 256, 257]),
    *product([2], [1, 3], [(192, 128), (24, 96)], [150], [140]),
    *product([1], [2], [64], [4400], [4100]),
]
"""Sequences, queries of a KV head, widths of K and V, rows, and how many of them are tokens."""


def example(batch, queries, widths, capacity, tokens, *, dtype=torch.float32, device="cpu"):
    """A query for two KV heads, their rows, which are no numbers behind the tokens, and the counter
    of the tokens. Rows of a sequence lie side by side for all heads, as no static cache has them.
    """
    generator = torch.Generator().manual_seed(0)
    key_dim, value_dim = (widths, widths) if isinstance(widths, int) else widths
    query = torch.randn(batch, 2 * queries, 1, key_dim, generator=generator)
    rows = torch.randn(batch, capacity, 2, key_dim + value_dim, generator=generator) + 1
    rows[:, tokens:] = float("nan")
    key, value = rows.to(device, dtype).transpose(1, 2).split([key_dim, value_dim], dim=3)
    return query.to(device, dtype), key, value, torch.tensor(tokens, device=device)


def reference(query, key, value, visible, *, scaling):
    """The same in plain PyTorch, computed in fp32 and without reading the counter."""
    seen = torch.arange(key.shape[2], device=key.device) < visible
    keys, values = (torch.where(seen[:, None], rows.float(), 0) for rows in (key, value))
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    mask = seen.expand(grouped.shape[2], -1)
    output = scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1).to(query.dtype)


def error_of(point, *, dtype=torch.float32, device="cpu"):
    """The largest difference between the kernels and the reference."""
    query, key, value, visible = example(*point, dtype=dtype, device=device)
    assert fits(query, key, value)
    found = attend(query, key, value, visible, scaling=0.3)
    assert found.dtype == dtype
    expected = reference(query.float(), key, value, visible, scaling=0.3)
    assert found.shape == expected.shape
    difference = (found.float() - expected).abs().max().item()
    return difference if difference == difference else "no number"  # noqa: PLR0124 - NaN


@pytest.fixture(scope="module")
def errors():
    """What this file prints under the interpreter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed, the kernels are not interpreted")
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([f"{root}", f"{root / 'tests'}", os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_kernels_attend_to_the_rows_before_the_counter(errors):
    """Around blocks and splits, for several heads, widths and sequences, to the rounding of fp32;
    no row behind the counter is read, and no split behind it counts.
    """
    assert len(errors["fp32"]) == len(POINTS)
    assert max(errors["fp32"]) < 1e-5


def test_kernels_round_like_the_dtype(errors):
    """In fp16 the error is that of rounding weights and outputs: halves of an ulp."""
    assert max(errors["fp16"]) < 4 * 2**-11


def test_a_model_decodes_by_the_kernels(errors):
    """From the model down to the kernels, in fp32: the same logits."""
    assert errors["logits"] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, nothing is compiled")
def test_kernels_attend_on_a_gpu():
    """Compiled they give the same, and bf16 rounds by its 8 bits."""
    device = torch.device("cuda")
    for point in POINTS:
        assert error_of(point, device=device) < 1e-4
        assert error_of(point, dtype=torch.bfloat16, device=device) < 2**-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, SDPA has one way")
@pytest.mark.parametrize(
    ("dtype", "widths", "answered"),
    [
        (torch.bfloat16, (128, 128), "flash"),
        (torch.bfloat16, (192, 128), "sdpa"),
        (torch.float32, (128, 128), "sdpa"),
    ],
)
def test_a_piece_takes_no_mask_on_a_gpu(dtype, widths, answered):
    """The last 1,000 of 8,000 tokens: right, by the kernel that was named, and with no memory for
    scores of 16 heads.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, 1000, widths[0]), (2, 2, 8000, widths[0]), (2, 2, 8000, widths[1])]
    states = [
        torch.randn(shape, dtype=dtype, device="cuda", generator=generator) for shape in shapes
    ]
    plain.calls.clear()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with plain.one_backend(torch.device("cuda")):
        found = attend_lower_right(*states, scaling=0.3)
    most = torch.cuda.max_memory_allocated() - before
    assert plain.calls == {answered: 1}
    repeated = 0 if answered == "flash" else 4 * sum(one.nbytes for one in states[1:])
    assert most < repeated + 2**25 < repeated + 16 * 1000 * 8000 * dtype.itemsize
    mask = torch.ones(1000, 8000, dtype=torch.bool, device="cuda").tril(7000)
    query, key, value = (one.float() for one in states)
    expected = scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert (found.float() - expected).abs().max() < (2**-4 if dtype == torch.bfloat16 else 1e-3)


@pytest.fixture
def on_cpu(monkeypatch):
    """Open on a CPU, too: the reference in place of the kernels."""
    monkeypatch.setattr(plain, "applies", lambda device: True)
    monkeypatch.setattr(plain, "fused_available", lambda device: True)
    monkeypatch.setattr(plain, "attend", reference)


STEPS = 3


def run(model, cache, *, batch, pieces):
    """Logits of a prompt in pieces and of STEPS steps, [batch, tokens, vocabulary]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 64, (batch, sum(pieces) + STEPS), generator=generator)
    tokens = tokens.to(model.device)
    cache = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 5)
    )
    with torch.inference_mode():
        outputs = [
            model(input_ids=piece, past_key_values=cache, use_cache=True)
            for piece in tokens.split([*pieces, *[1] * STEPS], dim=1)
        ]
    return torch.cat([output.logits for output in outputs], dim=1)


MODELS = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma3_text": {"num_hidden_layers": 6},  # every sixth layer sees all
    "mistral": {},  # windows
    "mixtral": {"sliding_window": None},
    "deepseek_v3": {},  # keys wider than values
    "deepseek_v32": {"index_topk": 6},  # an indexer that reads the mask
    "gpt_oss": {},  # sinks
    "phi3": {"sliding_window": None},
    "llama4_text": {},  # attention in chunks
    "falcon": {},  # insists on a mask
    "qwen3_next": {},  # every fourth layer attends, the others keep states
}


def model_of(model_type):
    """A tiny one with random weights."""
    config = tiny_config(model_type, **MODELS[model_type])
    if model_type == "falcon":
        del config["head_dim"]  # which it works out
    return build(config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_those_of_sdpa(on_cpu, monkeypatch, model_type, cache, fused):
    """With a prompt in one and in several pieces, also of one token, for one and two sequences,
    where the kernels run and where they do not.
    """
    model = model_of(model_type)
    monkeypatch.setattr(plain, "fused_available", lambda device: fused)
    for batch, pieces in ((1, [20]), (2, [9, 6, 5]), (2, [1, 7, 1, 3])):
        expected = run(model, cache, batch=batch, pieces=pieces)
        with attending(model):
            found = run(model, cache, batch=batch, pieces=pieces)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, nothing is replaced")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
def test_logits_on_a_gpu_are_those_of_sdpa(model_type, cache):
    """By the kernels themselves, in fp32."""
    model = model_of(model_type).to("cuda")
    expected = run(model, cache, batch=2, pieces=[9, 6, 5])
    with plain.one_backend(model.device), attending(model) as calls:
        found = run(model, cache, batch=2, pieces=[9, 6, 5])
        assert bool(calls["fused"]) == (cache == "static")
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("model_type", "layers"), [("llama", 4), ("gemma3_text", 1), ("deepseek_v3", 4), ("mistral", 0)]
)
def test_no_mask_is_made_for_layers_that_see_all(on_cpu, monkeypatch, model_type, layers):
    """The second and third piece are lower-right triangles of the rows that are filled, each step
    of a static cache is one call of the kernels; those of a growing cache need no mask anyway.
    """
    model = model_of(model_type)
    monkeypatch.setattr(CausalMask, "made", pytest.fail)
    seen = []

    def spy(query, key, value, *, scaling):
        seen.append((query.shape[2], key.shape[2]))
        return attend_lower_right(query, key, value, scaling=scaling)

    monkeypatch.setattr(plain, "attend_lower_right", spy)
    for cache in ("dynamic", "static"):
        seen.clear()
        with attending(model) as calls:
            run(model, cache, batch=2, pieces=[9, 6, 5])
            assert calls["fused"] == layers * STEPS * (cache == "static")
        assert seen == [(6, 15)] * layers + [(5, 20)] * layers


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3"])
def test_a_step_by_the_kernels_can_be_captured(on_cpu, model_type):
    """It reads nothing back and copies nothing from the host; repeated, it attends to one token
    more each time.
    """
    model = build(tiny_config(model_type))
    expected, _ = decoded(model, graphed=False)
    with attending(model) as calls:
        found, mode = decoded(model, capture=strict_capture)
        assert calls["fused"]
    assert mode == "CUDA graph"
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, nothing is captured")
def test_a_replayed_step_is_by_the_kernels():
    """On a GPU, by a real graph."""
    model = build(tiny_config("llama", head_dim=16)).to("cuda")
    expected, _ = decoded(model, graphed=False)
    with attending(model) as calls:
        found, mode = decoded(model)
        assert calls["fused"]
    assert mode == "CUDA graph"
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("new", "rows", "offset"),
    [(3, 9, 6), (3, 12, 6), (2, 40, torch.tensor(7)), (1, 40, torch.tensor(39)), (1, 9, 8)],
)
def test_a_mask_is_the_one_of_transformers(new, rows, offset):
    """Made when something computes with it, whatever that is."""
    settings = {"batch_size": 2, "q_length": new, "kv_length": rows, "q_offset": offset}
    expected = sdpa_mask(**settings, allow_is_causal_skip=False)
    found = causal_mask(**settings, allow_is_causal_skip=False)
    assert isinstance(found, CausalMask) == (new > 1 or rows == 40)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(~found, ~expected)
    assert torch.equal(found[:, :, :, 1:], expected[:, :, :, 1:])
    assert torch.equal(torch.where(found, 0.0, -1.0), torch.where(expected, 0.0, -1.0))


def test_a_mask_keeps_its_step():
    """The cache counts the tensor it came from up before attention comes."""
    counter = torch.tensor(4)
    mask = causal_mask(batch_size=1, q_length=1, kv_length=9, q_offset=counter)
    counter.add_(1)
    assert mask.visible == 5
    assert mask.made().sum() == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_function": masking_utils.sliding_window_causal_mask_function(4), "local_size": 4},
        {"mask_function": masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long())},
        {"mask_function": masking_utils.bidirectional_mask_function},
        {"attention_mask": torch.tensor([[0] + [1] * 8, [1] * 9]).bool()},
        {"q_length": 1, "q_offset": 8},
        {"q_length": 9, "q_offset": 0},
    ],
)
def test_other_masks_are_made_as_before(settings):
    """Windows, chunks, padding and what sees all; none where `sdpa` needs none."""
    settings = {"batch_size": 2, "q_length": 3, "kv_length": 9, "q_offset": 6} | settings
    expected, found = sdpa_mask(**settings), causal_mask(**settings)
    assert not isinstance(found, CausalMask)
    assert found is expected is None or torch.equal(found, expected)


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
        ({"position_bias": torch.zeros(2, 4, 1, 150)}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"never_heard_of": 1}, False),
    ],
)
def test_what_is_more_than_plain_attention_is_left_to_sdpa(on_cpu, arguments, fused):
    """With the mask as it would be without us; an argument that nobody here knows is not ignored,
    and `sdpa` refuses softcapping in its own words.
    """
    query, key, value, visible = example(2, 2, 16, 150, 150)
    mask = CausalMask((2, 1, 1, 150), visible, "cpu")
    plain.calls.clear()
    found, _ = attention(Module(), query, key, value, mask, **arguments)
    assert plain.calls == {"fused" if fused else "sdpa": 1}
    expected = reference(query, key, value, visible, scaling=arguments.get("scaling", 16**-0.5))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "widths", "why"),
    [
        (torch.float32, 512, "512 channels"),
        (torch.float32, (16, 512), "512 channels of V"),
        (torch.float64, 16, "double precision"),
    ],
)
def test_shapes_that_do_not_fit_are_left_to_sdpa(dtype, widths, why):
    """The kernels take heads of up to 256 channels in three dtypes."""
    query, key, value, _ = example(1, 2, widths, 5, 5, dtype=dtype)
    assert not fits(query, key, value), why


def test_splits_are_whole_blocks_and_their_number_is_bounded():
    """For any capacity and heads, and the programs of a long cache are many times 132."""
    for capacity, heads in product((1, 100, 8_257, 131_072, 1_000_000), (1, 8, 64, 1_024)):
        tokens = split_tokens(capacity=capacity, heads=heads)
        assert tokens % plain.SPLIT_MULTIPLE == 0
        assert -(-capacity // tokens) * heads <= plain.MOST_PROGRAMS + heads
    assert -(-131_072 // split_tokens(capacity=131_072, heads=8)) * 8 == 1_024


def replaced():
    """Whether `sdpa` is another function now, and makes other masks."""
    found = ALL_ATTENTION_FUNCTIONS["sdpa"], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return found == (attention, causal_mask)


def test_sdpa_is_restored(on_cpu):
    """After an error, too; and a model that attends in another way keeps it."""
    model = build(tiny_config("llama"))
    with attending(model):
        assert replaced()
    with pytest.raises(IndexError), attending(model):
        model(input_ids=torch.tensor([[10_000]]))
    assert not replaced()
    model.set_attn_implementation("eager")
    with attending(model) as calls:
        run(model, "static", batch=1, pieces=[4, 3])
    assert not calls


def test_without_cuda_nothing_is_replaced():
    """On a CPU a model attends as before."""
    model = build(tiny_config("llama"))
    with attending(model) as calls, plain.one_backend(model.device):
        assert not replaced()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        run(model, "static", batch=1, pieces=[4, 3])
    assert not calls


@pytest.mark.parametrize(
    ("spec", "own"),
    [("dynamic", False), ("static", False), ("paged", False), ("snapkv", True), ("int4", True)],
)
def test_every_strategy_is_run_on_one_backend(on_cpu, monkeypatch, spec, own):
    """A strategy without an attention of its own gets this one; cuDNN plans for none of them."""
    one_backend = plain.one_backend
    monkeypatch.setattr(plain, "one_backend", lambda device: one_backend(torch.device("cuda")))
    model = build(tiny_config("llama"))
    loaded = SimpleNamespace(model=model, device=model.device)
    with undisturbed(loaded, load_strategy(spec)):
        assert replaced() is not own
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    assert torch.backends.cuda.cudnn_sdp_enabled()


def main():
    """Print the errors as JSON."""
    found = {"fp32": [error_of(point) for point in POINTS]}
    # NumPy, which the interpreter computes with, has no bf16.
    found["fp16"] = [error_of(point, dtype=torch.float16) for point in POINTS]
    model = build(tiny_config("llama", head_dim=16))
    settings = {"cache": "static", "batch": 2, "pieces": [9, 5]}
    expected = run(model, **settings)
    plain.applies = plain.fused_available = lambda device: True
    with attending(model) as calls:
        found["logits"] = (run(model, **settings) - expected).abs().max().item()
    assert calls["fused"]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
