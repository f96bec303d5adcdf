"""Every strategy on several models: what is held is what is promised, and evicting changes nothing
but what attention can see.
"""

from functools import cache

import pytest
import torch
from tiny import WINDOW, build, tiny_config
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvcalc
from kvcalc.measure import retrieval
from kvcalc.measure.held import held_by_layer
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.session import Session, few_objects, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.strategies import load_strategy, strategy_names
from kvcalc.strategies._evicting_cache import EvictingStorage
from kvcalc.strategies._parameters import Budget

BUDGET = 12

SMALL = {
    "block": 4,
    "chunk": 8,
    "every": 2,
    "group": 4,
    "kernel": 3,
    "r_max": 2,
    "recent": 4,
    "residual": 8,
    "segment": 4,
    "sinks": 2,
    "window": 4,
}
"""Parameters of these names, wherever a strategy has them, so that short prompts show all."""

MODELS = {
    "built-in": retrieval.retrieval_config(num_layers=4),
    "llama": tiny_config("llama"),
    "qwen3": tiny_config("qwen3"),
    "mistral": tiny_config("mistral", sliding_window=None),
    "mistral window": tiny_config("mistral", sliding_window=WINDOW),
    "gemma3_text": tiny_config(
        "gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "phi3": tiny_config("phi3", sliding_window=None),
    "deepseek_v3": tiny_config("deepseek_v3"),
}

PROMPTS = {"below": BUDGET - 3, "at": BUDGET, "above": 3 * BUDGET + 1}

COMBINATIONS = ("snapkv+int4", "snapkv+int8", "random+int2", "snapkv+fp8")


def spec_of(name, *, budget=BUDGET):
    """The strategy with small parameters."""
    one, plus, other = name.partition("+")
    chosen = load_strategy(one)
    parameters = {
        key: budget if isinstance(value, Budget) else SMALL.get(key, value)
        for key, value in chosen.parameters.items()
    }
    small = ",".join(f"{key}={value}" for key, value in parameters.items())
    return f"{one}:{small}".rstrip(":") + (f"+{spec_of(other)}" if plus else "")


NAMES = (*strategy_names(), *COMBINATIONS)
EVICTING = [name for name in NAMES if load_strategy(name).compresses]
BUDGETED = [
    name
    for name in EVICTING
    if any(isinstance(value, Budget) for value in load_strategy(name).parameters.values())
]


@pytest.fixture(autouse=True, scope="module")
def few():
    """Each run collects garbage, which need not go through all that other tests have made."""
    with few_objects():
        yield


@cache
def loaded(model_name):
    """A small model with random weights, or the wired one."""
    config = MODELS[model_name]
    if model_name == "built-in":
        model = retrieval.build(config, "cpu")
    else:
        model = build(config)
        model.requires_grad_(requires_grad=False)
    return LoadedModel(
        model=model,
        name=model_name,
        architecture=kvcalc.families.describe(config),
        origin=None,
        device=torch.device("cpu"),
        dtype="fp32",
        weights="random",
    )


def tokens_of(batch, tokens):
    """The same random tokens for the same shape; 0 may be padding."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(1, 60, (batch, tokens), generator=generator)


def promised(model_name, spec, prompt_tokens, decode_tokens, batch):
    """Bytes of each layer."""
    report = kvcalc.size(
        MODELS[model_name],
        seq=prompt_tokens,
        decode=decode_tokens,
        batch=batch,
        kv_dtype="fp32",
        engine="transformers",
        strategy=spec,
    )
    return [layer.bytes for layer in report.layers]


def workload_of(prompt_tokens, batch, decode_tokens):
    """Chunks as long as the prompt."""
    return Workload(prompt_tokens, decode_tokens, batch, 1, 0, 0)


def run(model_name, spec, prompt_tokens, batch, decode_tokens, *, watch=None):
    """Feed a prompt and steps; yields the session and the logits [batch, vocabulary] after each.

    `watch` is called with the session before anything is fed.
    """
    chosen, model = load_strategy(spec), loaded(model_name)
    tokens = tokens_of(batch, prompt_tokens + decode_tokens)
    with undisturbed(model, chosen):
        session = Session(model, chosen, workload_of(prompt_tokens, batch, decode_tokens))
        if watch:
            watch(session)
        yield session, session.prefill(tokens[:, :prompt_tokens])
        for step in tokens[:, prompt_tokens:].split(1, dim=1):
            yield session, session.decode(step)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_held_is_promised(name, model_name):
    """Whatever the prompt's length and however many sequences, after each decode step every layer
    holds what is promised (or all together, where the prompt spreads the budget), or the strategy
    is refused when it is sized.
    """
    spec = spec_of(name)
    chosen = load_strategy(spec)
    try:
        promised(model_name, spec, 10, 0, 1)
    except kvcalc.UnsupportedError:
        return
    if name.startswith(("quanto", "hqq")):
        pytest.importorskip("hqq" if name.startswith("hqq") else "optimum.quanto")
    for prompt_tokens in PROMPTS.values():
        for batch in (1, 2):
            for decoded, (session, _) in enumerate(run(model_name, spec, prompt_tokens, batch, 6)):
                if not decoded or chosen.recomputes:
                    continue
                if name in ("static", "offload"):  # allocated at once
                    decoded = 6  # noqa: PLW2901
                held = [layer.held_bytes for layer in held_by_layer(session.cache)]
                promise = promised(model_name, spec, prompt_tokens, decoded, batch)
                if chosen.layers_share:
                    held, promise = sum(held), sum(promise)
                assert held == promise, (prompt_tokens, batch, decoded)


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "mistral window"])
@pytest.mark.parametrize("name", [name for name in BUDGETED if "+" not in name])
def test_a_budget_of_the_whole_prompt_changes_nothing(name, model_name):
    """Logits are those of the full cache, to 1e-5, where nothing need be dropped."""
    spec = spec_of(name, budget=200)
    try:
        promised(model_name, spec, 30, 0, 1)
    except kvcalc.UnsupportedError:
        return
    for (_, logits), (_, full) in zip(
        run(model_name, spec, 30, 2, 4), run(model_name, "dynamic", 30, 2, 4), strict=True
    ):
        torch.testing.assert_close(logits, full, atol=1e-5, rtol=0)


class Masked:
    """An attention function that hides dropped tokens of a full cache from its queries: the oracle.

    `alive` has for each attention module [batch, KV heads, tokens] booleans.
    """

    def __init__(self):
        self.alive = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Plain attention over what is alive, in the order of the tokens."""
        new, rows = query.shape[2], key.shape[2]
        mask = torch.ones(new, rows, dtype=torch.bool).tril(rows - new)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[..., :rows]
        alive = self.alive.get(module.layer_idx)
        if alive is not None and rows > new:
            alive = functional.pad(alive, (0, rows - alive.shape[2]), value=True)
            heads = query.shape[1] // alive.shape[1]
            mask = mask & alive.repeat_interleave(heads, dim=1)[:, :, None]
        heads = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(heads, dim=1) for states in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None


masked = Masked()
AttentionInterface.register("masked_oracle", masked)
AttentionMaskInterface.register("masked_oracle", sdpa_mask)


def alive_after(records, tokens):
    """Which of `tokens` tokens are still there after the evictions of one layer, each a choice
    among the rows that were there then; None where none was dropped.
    """
    if not records:
        return None
    alive = records[0]
    for stays in records[1:]:
        there = functional.pad(alive, (0, tokens - alive.shape[2]), value=True)
        grown = there.cumsum(2) - 1
        seen = stays.shape[2]
        alive = there & (stays.gather(2, grown.clamp(0, seen - 1)) | (grown >= seen))
    return alive


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "mistral window"])
@pytest.mark.parametrize("name", [name for name in EVICTING if "+" not in name])
def test_evicting_is_masking_without_the_memory(name, model_name):
    """With part of the prompt dropped, logits are those of a full cache whose dropped tokens are
    hidden from attention.
    """
    spec = spec_of(name)
    chosen = load_strategy(spec)
    try:
        promised(model_name, spec, 30, 0, 1)
    except kvcalc.UnsupportedError:
        return
    if getattr(chosen.strategy, "ALTERS", False):
        return  # tested on its own: it does more than hide tokens
    records = {}

    def watch(session):
        for index, layer in enumerate(session.cache.layers):
            if isinstance(layer, EvictingStorage):
                records[index] = layer.kept = []

    prompt_tokens, batch, decode_tokens = 30, 2, 5
    tokens = tokens_of(batch, prompt_tokens + decode_tokens)
    model = loaded(model_name).model
    full = DynamicCache(config=model.config)
    masked.alive = {}
    pieces = (tokens[:, :prompt_tokens], *tokens[:, prompt_tokens:].split(1, dim=1))
    seen = 0
    steps = run(model_name, spec, prompt_tokens, batch, decode_tokens, watch=watch)
    for piece, (_, logits) in zip(pieces, steps, strict=True):
        before = model.config._attn_implementation
        model.set_attn_implementation("masked_oracle")
        try:
            with torch.no_grad():
                expected = model(input_ids=piece, past_key_values=full, use_cache=True).logits
        finally:
            model.set_attn_implementation(before)
        torch.testing.assert_close(logits, expected[:, -1], atol=1e-4, rtol=1e-4)
        seen += piece.shape[1]
        masked.alive = {
            index: alive
            for index, kept in records.items()
            if (alive := alive_after(kept, seen)) is not None
        }
    assert records
    assert any(not alive.all() for alive in masked.alive.values())
