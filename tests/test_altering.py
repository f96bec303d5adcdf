"""Strategies that do more than hide tokens, each held against a plain reading of its paper.

What is compared with is computed another way: attention weights that eager attention returns, loops
over tokens, a cache of transformers filled by hand.
"""

import math

import pytest
import torch
from test_evicting import MODELS, loaded, promised, run, tokens_of
from tiny import build, tiny_config
from transformers import DynamicCache

import kvcalc
from kvcalc.dtypes import FORMATS
from kvcalc.families import describe
from kvcalc.measure.held import held_by_layer
from kvcalc.measure.session import few_objects, undisturbed
from kvcalc.strategies import load_strategy

PROMPT, BATCH, DECODED = 60, 2, 4

LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131_072,
}


@pytest.fixture(autouse=True, scope="module")
def few():
    """Each run collects garbage, which need not go through all that other tests have made."""
    with few_objects():
        yield


def decoded_by_hand(model_name, rows, tokens):
    """Logits after each decode step [batch, 1] of a transformers cache that holds these rows (K, V)
    of each layer.
    """
    model = loaded(model_name).model
    by_hand = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(rows):
        by_hand.update(keys, values, index)
    with torch.inference_mode():
        for position, step in enumerate(tokens.split(1, dim=1), PROMPT):
            positions = torch.full((BATCH, 1), position)
            output = model(input_ids=step, position_ids=positions, past_key_values=by_hand)
            yield output.logits[:, -1]


def prompt_rows(model_name, tokens):
    """K and V of every layer of a full cache."""
    with torch.inference_mode():
        full = loaded(model_name).model(input_ids=tokens, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in full.layers]


FASTKV = {"budget": 12, "tsp_share": 24, "window": 4, "kernel": 3, "pooling": "avg"}
"""The largest of neighbours gives equal scores, and nothing says which of equals is kept."""


def spec_of(name, parameters):
    """`name:key=value,…`."""
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in parameters.items())


def snapkv_scores(weights, kv_heads):
    """Scores [batch, KV heads, tokens before the window] from attention weights [batch, query
    heads, tokens, tokens], token by token.
    """
    window, kernel = FASTKV["window"], FASTKV["kernel"]
    summed = weights[:, :, -window:, :-window].sum(2).unflatten(1, (kv_heads, -1)).mean(2)
    return torch.stack(
        [
            summed[..., max(place - kernel // 2, 0) : place + kernel // 2 + 1].sum(-1) / kernel
            for place in range(summed.shape[-1])
        ],
        dim=-1,
    )


def best_with_window(scores, count):
    """Indices of the best and of the window, in order, `count` in all; along the last axis."""
    window = FASTKV["window"]
    order = scores.argsort(dim=-1, descending=True)[..., : count - window].sort(-1).values
    last = torch.arange(scores.shape[-1], scores.shape[-1] + window)
    return torch.cat([order, last.expand(*order.shape[:-1], window)], dim=-1)


def fastkv_by_hand(model, tokens):
    """FastKV as a loop over a model's decoder layers: rows of each, and logits after the prompt."""
    decoder = model.model
    rows = []
    weights = []
    watches = [
        layer.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1]))
        for layer in decoder.layers
    ]
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            hidden = decoder.embed_tokens(tokens)
            positions = torch.arange(PROMPT).expand(BATCH, PROMPT)
            for index, layer in enumerate(decoder.layers):
                here = hidden.shape[1]
                own = DynamicCache(config=model.config)
                mask = torch.full((here, here), -torch.inf).triu(1)
                hidden = layer(
                    hidden,
                    attention_mask=mask[None, None],
                    position_ids=positions,
                    position_embeddings=decoder.rotary_emb(hidden, positions),
                    past_key_values=own,
                )
                keys, values = own.layers[index].keys, own.layers[index].values
                scores = snapkv_scores(weights[index], keys.shape[1])
                kept = best_with_window(scores, FASTKV["budget"])
                rows.append(
                    [states.take_along_dim(kept[..., None], 2) for states in (keys, values)]
                )
                if index == len(decoder.layers) // 2 - 1:
                    chosen = best_with_window(scores.sum(1), FASTKV["tsp_share"])
                    hidden = hidden.take_along_dim(chosen[..., None], 1)
                    positions = positions.take_along_dim(chosen, 1)
            return rows, model.lm_head(decoder.norm(hidden[:, -1]))
    finally:
        model.set_attn_implementation("sdpa")
        for watch in watches:
            watch.remove()


FASTKV_MODELS = [
    name for name in MODELS if name not in ("built-in", "mistral window", "gemma3_text")
]


@pytest.mark.parametrize("model_name", FASTKV_MODELS)
def test_fastkv_is_a_loop_that_slices(model_name):
    """Rows of every layer, and logits after the prompt and each decode step, are those of a loop
    over the decoder layers that slices hidden states itself.
    """
    tokens = tokens_of(BATCH, PROMPT + DECODED)
    rows, first = fastkv_by_hand(loaded(model_name).model, tokens[:, :PROMPT])
    expected = [first, *decoded_by_hand(model_name, rows, tokens[:, PROMPT:])]
    steps = run(model_name, spec_of("fastkv", FASTKV), PROMPT, BATCH, DECODED)
    for number, (logits, (session, found)) in enumerate(zip(expected, steps, strict=True)):
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
        assert session.cache.get_seq_length() == PROMPT + number
        if number == 0:
            for layer, (keys, values) in zip(session.cache.layers, rows, strict=True):
                torch.testing.assert_close(layer.rows.keys, keys, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(layer.rows.values, values, atol=1e-5, rtol=1e-4)
                assert layer.get_seq_length() == PROMPT
    assert not torch.equal(expected[0], plain_logits(model_name, tokens[:, :PROMPT]))


def plain_logits(model_name, tokens):
    """Those after a prompt without any strategy."""
    with torch.inference_mode():
        return loaded(model_name).model(input_ids=tokens).logits[:, -1]


@pytest.mark.parametrize("model_name", [*FASTKV_MODELS, "built-in"])
@pytest.mark.parametrize("then", ["", "+int4:group=4,residual=8"])
def test_fastkv_keeps_as_many_in_every_layer(then, model_name):
    """Held is promised where later layers see more than they keep, in every layer, and only the
    part of the prompt that goes on is computed there.
    """
    spec = spec_of("fastkv", FASTKV) + then
    seen = []
    layers = loaded(model_name).model.model.layers
    watches = [
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for layer in layers
    ]
    try:
        for decoded, (session, _) in enumerate(run(model_name, spec, PROMPT, BATCH, DECODED)):
            held = [layer.held_bytes for layer in held_by_layer(session.cache)]
            if decoded:
                assert held == promised(model_name, spec, PROMPT, decoded, BATCH)
                assert seen == [1] * len(layers)
            else:
                half = len(layers) // 2
                assert seen == [PROMPT] * half + [FASTKV["tsp_share"]] * half
            seen.clear()
    finally:
        for watch in watches:
            watch.remove()


def test_fastkv_leaves_no_hook():
    """After a run the model's layers have no hooks and attend as before."""
    model = loaded("llama").model
    with undisturbed(loaded("llama"), load_strategy("fastkv")):
        assert all(layer._forward_hooks for layer in model.model.layers)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    assert model.config._attn_implementation == "sdpa"


def test_fastkv_refuses_what_it_cannot_slice():
    """Windows, states and inputs whose tokens it does not find are refused with the reason."""
    with pytest.raises(kvcalc.UnsupportedError, match="part of the tokens"):
        promised("gemma3_text", "fastkv", 100, 0, 1)
    model = loaded("llama").model
    strange = model.model.layers[3].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"strange": torch.zeros(3, 1, PROMPT)}),
        with_kwargs=True,
    )
    try:
        with pytest.raises(kvcalc.UnsupportedError, match="argument strange"):
            list(run("llama", spec_of("fastkv", FASTKV), PROMPT, BATCH, 0))
    finally:
        strange.remove()
    for model_type in ("gpt2", "longcat_flash"):
        with (
            pytest.raises(kvcalc.UnsupportedError, match="does not find"),
            load_strategy("fastkv").running.attending(build(tiny_config(model_type))),
        ):
            pass
    smaller = spec_of("fastkv", FASTKV | {"tsp_share": 10})
    for attempt in (
        lambda: promised("llama", smaller, PROMPT, 0, 1),
        lambda: list(run("llama", smaller, PROMPT, BATCH, 0)),
    ):
        with pytest.raises(kvcalc.InputError, match="fewer than the 12"):
            attempt()


def test_the_tsp_layer_is_the_papers():
    """Index 15 of 32 layers; half of the layers see the whole prompt, whatever their number."""
    from kvcalc.strategies.fastkv import tsp_place

    assert [tsp_place(0.5, places) for places in (32, 13, 4, 2, 1)] == [15, 6, 1, 0, 0]
    assert tsp_place(1, 4) == 3


def test_fastkv_slices_masks():
    """Of a mask [1, 1, tokens, tokens] the rows and columns of each sequence's tokens are taken."""
    from kvcalc.strategies.fastkv.cache import Passed

    mask = torch.rand(1, 1, 6, 6)
    chosen = torch.tensor([[0, 2, 5], [1, 2, 3]])
    found = Passed(chosen, 6).sliced("mask", mask)
    for sequence, own in enumerate(chosen):
        for one, asks in enumerate(own):
            for two, sees in enumerate(own):
                assert found[sequence, 0, one, two] == mask[0, 0, asks, sees]


ROCKETKV = {"budget": 8, "window": 4, "kernel": 3}
LONG = 200
"""Tokens of which 8 are the budget: 42 are kept, in chunks of 3, and 4 are read."""


@pytest.mark.parametrize(
    ("tokens", "budget", "ratio"), [(102_400, 256, 55.6), (16_384, 256, 7.7), (131_072, 1024, 15.2)]
)
def test_rocketkv_stores_what_its_split_says(tokens, budget, ratio):
    """Storage is the published algorithm's: 55.6 times less at 102,400 tokens, where a step reads
    400 times less.
    """
    size = {"seq": tokens, "engine": "transformers"}
    full = kvcalc.size(LLAMA_31_8B, **size).total_bytes
    stored = kvcalc.size(LLAMA_31_8B, strategy=f"rocketkv:budget={budget}", **size).total_bytes
    assert round(full / stored, 1) == ratio
    chosen = load_strategy(f"rocketkv:budget={budget}")
    traffic = chosen.figures(
        describe(LLAMA_31_8B).layers, tokens=tokens, batch=1, dtype=FORMATS["bf16"]
    )["traffic_bytes"]
    assert full / traffic == pytest.approx(tokens / budget, rel=0.02)


def rocket_step(seen, split):
    """One step of the second stage by loops: output [batch, 1, query heads, width], and how many
    tokens were read.
    """
    batch, heads, _, width = seen.query.shape
    kv_heads, rows = seen.key.shape[1:3]
    group = heads // kv_heads
    output = torch.empty(batch, 1, heads, seen.value.shape[3])
    count = 0
    for sequence in range(batch):
        for head in range(kv_heads):
            queries = seen.query[sequence, head * group : (head + 1) * group, 0]
            keys, values = seen.key[sequence, head], seen.value[sequence, head]
            sizes = queries.abs().sum(0)
            channels = sorted(range(width), key=lambda channel: -sizes[channel])
            channels = channels[: split.channels(width)]
            logits = torch.zeros(group, rows)
            for row in range(rows):
                first = row - row % split.chunk
                mates = keys[first : min(first + split.chunk, rows)]
                for channel in channels:
                    column = mates[:, channel]
                    bound = column.max() if queries[:, channel].sum() > 0 else column.min()
                    logits[:, row] += queries[:, channel] * bound
            scores = (logits * seen.scaling).softmax(-1).mean(0)
            read = sorted(range(rows), key=lambda row: (-scores[row].item(), row))
            hidden = torch.ones(rows, dtype=torch.bool)
            hidden[read[: split.tokens]] = False
            count = int((~hidden).sum())
            weights = (queries @ keys.T * seen.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
            output[sequence, 0, head * group : (head + 1) * group] = weights @ values
    return output, count


@pytest.mark.parametrize("budget", [8, 100])
@pytest.mark.parametrize("model_name", ["llama", "qwen3", "mistral", "phi3"])
def test_rocketkv_attends_to_what_its_index_points_to(model_name, budget, monkeypatch):
    """Attention of decode steps is full attention that is masked to the tokens with the best
    approximate scores, computed here token by token; with chunks of several tokens and of one.
    """
    from kvcalc.strategies.rocketkv.cache import RocketKVStorage

    calls = []

    def attend(self, module, seen, own=RocketKVStorage.attend):
        output = own(self, module, seen)
        if seen.query.shape[2] == 1:
            calls.append((self.split, seen, output))
        return output

    monkeypatch.setattr(RocketKVStorage, "attend", attend)
    spec = spec_of("rocketkv", ROCKETKV | {"budget": budget})
    for session, _ in run(model_name, spec, LONG, BATCH, 3):
        for layer in session.cache.layers:
            assert_index_is_of_the_keys(layer)
    assert len(calls) == 3 * 4
    chunks = {split.chunk for split, _, _ in calls}
    assert chunks == ({3} if budget == 8 else {1})
    for split, seen, output in calls[::3]:
        expected, count = rocket_step(seen, split)
        assert count == split.tokens == budget // 2 < seen.key.shape[2]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def assert_index_is_of_the_keys(layer):
    """The bounds of each chunk are those of the keys that are there."""
    chunk, keys = layer.split.chunk, layer.rows.keys
    if chunk == 1:
        assert layer.bounds is None
        return
    for number, mates in enumerate(keys.split(chunk, dim=2)):
        expected = torch.cat([mates.min(2).values, mates.max(2).values], dim=-1)
        assert torch.equal(layer.bounds[:, :, number], expected)
    assert layer.bounds.shape[2] == math.ceil(keys.shape[2] / chunk)


@pytest.mark.parametrize("model_name", ["llama", "built-in", "gemma3_text"])
@pytest.mark.parametrize("budget", [8, 60, 100])
def test_rocketkv_holds_rows_and_index(model_name, budget):
    """Held is promised while the last chunk fills and new ones begin."""
    spec = spec_of("rocketkv", ROCKETKV | {"budget": budget})
    for decoded, (session, _) in enumerate(run(model_name, spec, LONG, BATCH, 7)):
        if decoded:
            held = [layer.held_bytes for layer in held_by_layer(session.cache)]
            assert held == promised(model_name, spec, LONG, decoded, BATCH)


def test_rocketkv_keeps_what_snapkv_keeps():
    """Of a prompt, the first stage keeps the tokens of SnapKV with the capacity as its budget."""
    rocket, _ = next(run("llama", spec_of("rocketkv", ROCKETKV), LONG, BATCH, 0))
    capacity = rocket.cache.layers[0].split.capacity
    snap, _ = next(run("llama", spec_of("snapkv", ROCKETKV | {"budget": capacity}), LONG, BATCH, 0))
    assert ROCKETKV["budget"] < capacity < LONG
    for one, other in zip(rocket.cache.layers, snap.cache.layers, strict=True):
        assert torch.equal(one.rows.keys, other.rows.keys)


def test_rocketkv_refuses_latents():
    """Latents are not the keys that queries meet."""
    with pytest.raises(kvcalc.UnsupportedError, match="expanded"):
        promised("deepseek_v3", "rocketkv", 100, 0, 1)


def slerp(one, other, t):
    """Directions of two vectors joined, in float64: Shoemake's formula."""
    one, other = (vector.double() for vector in (one, other))
    one, other = one / one.norm(), other / other.norm()
    angle = torch.dot(one, other).clamp(-1, 1).acos()
    return (((1 - t) * angle).sin() * one + (t * angle).sin() * other) / angle.sin(), angle


@pytest.mark.parametrize(("t", "gamma"), [(0.6, 0.05), (0.3, 0.2)])
@pytest.mark.parametrize("model_name", ["llama", "qwen3", "phi3"])
def test_minicache_restores_what_slerp_says(model_name, t, gamma):
    """Rows of the prompt come back as the joined direction times their own norm, computed token by
    token; those that differ most come back exactly.
    """
    tokens = tokens_of(BATCH, PROMPT + DECODED)
    rows = prompt_rows(model_name, tokens[:, :PROMPT])
    spec = f"minicache:t={t},gamma={gamma}"
    steps = run(model_name, spec, PROMPT, BATCH, DECODED)
    session, _ = next(steps)
    layers = session.cache.layers
    restored = []
    for layer, own in zip(layers[:2], rows, strict=False):
        assert torch.equal(layer.tail.keys, own[0])
        restored.append(own)
    kept = int(gamma * PROMPT)
    pair = [[merged.states() for merged in layer.merged] for layer in layers[2:]]
    for kind in (0, 1):
        for sequence in range(BATCH):
            for head in range(rows[2][kind].shape[1]):
                low, high = (rows[index][kind][sequence, head] for index in (2, 3))
                joined = [slerp(*both, t) for both in zip(low, high, strict=True)]
                order = sorted(range(PROMPT), key=lambda token: -joined[token][1].item())
                for token, (direction, _) in enumerate(joined):
                    for own, found in zip((low, high), pair, strict=True):
                        back = found[kind][sequence, head, token]
                        if token in order[:kept]:
                            assert torch.equal(back, own[token])
                        else:
                            expected = (direction * own[token].double().norm()).float()
                            torch.testing.assert_close(back, expected, atol=1e-5, rtol=1e-4)
    restored += pair
    for (_, found), logits in zip(
        steps, decoded_by_hand(model_name, restored, tokens[:, PROMPT:]), strict=True
    ):
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


DEEP = {
    "llama": tiny_config("llama", num_hidden_layers=7),
    "gemma3_text": tiny_config(
        "gemma3_text",
        num_hidden_layers=8,
        layer_types=["sliding_attention", "full_attention"] * 4,
    ),
}


@pytest.mark.parametrize("parameters", ["gamma=0.05", "gamma=0,start=0", "gamma=0.3,start=0.3"])
@pytest.mark.parametrize("name", DEEP)
def test_minicache_holds_what_it_promises(name, parameters, monkeypatch):
    """Each layer holds what is promised: directions in the lower of a pair only, whatever layers
    stand between them or are left alone.
    """
    monkeypatch.setitem(MODELS, f"deep {name}", DEEP[name])
    spec = f"minicache:{parameters}"
    for decoded, (session, _) in enumerate(run(f"deep {name}", spec, 41, BATCH, 3)):
        held = [layer.held_bytes for layer in held_by_layer(session.cache)]
        if decoded:
            assert held == promised(f"deep {name}", spec, 41, decoded, BATCH)
    uppers = [layer for layer in session.cache.layers if getattr(layer, "merged", None)]
    assert len(uppers) >= 2
    for low, high in zip(uppers[::2], uppers[1::2], strict=True):
        for one, other in zip(low.merged, high.merged, strict=True):
            assert one.directions.data_ptr() == other.directions.data_ptr()
            assert one.places.data_ptr() == other.places.data_ptr()


def test_minicache_merging_alone_is_not_five_times():
    """Merging the upper half of 32 layers gives 1.28×, and could not give more than 1.33×."""
    llama = LLAMA_31_8B | {"num_key_value_heads": 32, "hidden_size": 4096}
    full = kvcalc.size(llama, seq=4000).total_bytes
    merged = kvcalc.size(llama, seq=4000, strategy="minicache").total_bytes
    assert round(full / merged, 2) == 1.28
    nothing_else = kvcalc.size(llama, seq=4000, strategy="minicache:gamma=0").total_bytes
    assert full / nothing_else < 4 / 3


def test_minicache_joins_zeros_and_equals():
    """A row of zeros stays zero and leaves the other layer's as it is; so do rows that point the
    same way.
    """
    from kvcalc.strategies.minicache.cache import merge

    low = torch.tensor([[0.0, 0, 0], [1, 2, 2], [0, 0, 0], [3, 4, 0]])
    high = torch.tensor([[0.0, 3, 4], [0, 0, 0], [0, 0, 0], [6, 8, 0]])
    for own, merged in zip(
        (low, high), merge(low[None, None], high[None, None], t=0.6, gamma=0), strict=True
    ):
        torch.testing.assert_close(merged.states()[0, 0], own)


def test_minicache_refuses_what_it_cannot_merge():
    """Latents, single layers and shares that are none are refused."""
    with pytest.raises(kvcalc.UnsupportedError, match="latents"):
        promised("deepseek_v3", "minicache", 100, 0, 1)
    with pytest.raises(kvcalc.UnsupportedError, match="smaller start"):
        promised("llama", "minicache:start=0.9", 100, 0, 1)
    for wrong in ("start=1.5", "t=2", "gamma=1.01"):
        with pytest.raises(kvcalc.InputError, match="from 0 to 1"):
            promised("llama", f"minicache:{wrong}", 100, 0, 1)
