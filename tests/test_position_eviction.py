"""Strategies that keep tokens by place, by the newest attention or by their keys: what they keep is
what a plain reading of each procedure keeps, and StreamingLLM's positions are those in its cache.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import build, tiny_config
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvcalc
from kvcalc.errors import UnsupportedError
from kvcalc.strategies import load_strategy
from kvcalc.strategies._evicting_cache import attention
from kvcalc.strategies.nacl.cache import parts_of
from kvcalc.strategies.sink_window.cache import CONSTANT, ROTARY, frequencies_of
from kvcalc.strategies.treekv.cache import QUERIES, thinned

BATCH, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8
PROMPT, STEPS, BUDGET = 45, 9, 12
SCALING = 0.7
EACH_HEAD = list(itertools.product(range(BATCH), range(KV_HEADS)))


def random_states(tokens=PROMPT + STEPS):
    """Queries, keys and values [batch, heads, tokens, width]; a value says which token it is."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator)
    keys = torch.randn(BATCH, KV_HEADS, tokens, WIDTH, generator=generator)
    values = torch.arange(tokens).float()[:, None].expand(BATCH, KV_HEADS, tokens, WIDTH)
    return queries, keys, values


def kept_by(spec, prompt_tokens=PROMPT, states=None):
    """What a layer keeps after the prompt and after each step: lists of tokens, by sequence and KV
    head, of fixed states fed to its attention.
    """
    states = states or random_states()
    config = AutoConfig.for_model(
        "llama",
        hidden_size=HEADS * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    chosen = load_strategy(spec)
    cache = chosen.build(config, capacity_tokens=99, prompt_tokens=prompt_tokens)
    layer = cache.layers[0]
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False)
    tokens = states[0].shape[2]
    pieces = [prompt_tokens] + [1] * (tokens - prompt_tokens)
    for queries, keys, values in zip(*(part.split(pieces, dim=2) for part in states), strict=True):
        attention(module, queries, *layer.update(keys, values), None, scaling=SCALING)
        rows = getattr(layer, "rows", layer)
        yield {(b, h): rows.values[b, h, :, 0].int().tolist() for b, h in EACH_HEAD}


def attention_to(states, batch, head, asking, tokens):
    """Attention of one query head's token to some tokens, in plain arithmetic."""
    queries, keys, _ = states
    query = queries[batch, head, asking].tolist()
    logits = [
        SCALING * sum(map(float.__mul__, query, keys[batch, head // 2, token].tolist()))
        for token in tokens
    ]
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def group_attention(states, batch, kv_head, asking, tokens):
    """The mean over the query heads of a KV head."""
    two = (attention_to(states, batch, 2 * kv_head + i, asking, tokens) for i in range(2))
    return [sum(pair) / 2 for pair in zip(*two, strict=True)]


@pytest.mark.parametrize("prompt_tokens", [5, PROMPT])
def test_recency_keeps_the_last(prompt_tokens):
    """The last tokens, at every step, whether the prompt fills the budget or not."""
    for step, kept in enumerate(kept_by(f"recency:budget={BUDGET}", prompt_tokens)):
        last = list(range(prompt_tokens + step))[-BUDGET:]
        assert all(tokens == last for tokens in kept.values())


@pytest.mark.parametrize("positions", ["cache", "original"])
@pytest.mark.parametrize(("prompt_tokens", "budget"), [(5, BUDGET), (PROMPT, BUDGET), (PROMPT, 3)])
def test_sink_window_keeps_first_and_last(prompt_tokens, budget, positions):
    """Four sinks, or all but one of a smaller budget, and the last tokens."""
    spec = f"sink-window:budget={budget},positions={positions}"
    for step, kept in enumerate(kept_by(spec, prompt_tokens)):
        tokens = list(range(prompt_tokens + step))
        sinks = min(4, budget - 1)
        expected = tokens
        if len(tokens) > budget:
            expected = tokens[:sinks] + tokens[-(budget - sinks) :]
        assert all(tokens == expected for tokens in kept.values())


def test_tova_drops_what_the_newest_token_attends_to_least():
    """By the mean over all heads of a layer; the newest itself stays."""
    states = random_states()
    there = {batch: [] for batch in range(BATCH)}
    for step, kept in enumerate(kept_by(f"tova:budget={BUDGET}")):
        newest = PROMPT + step - 1
        for batch in range(BATCH):
            rows = there[batch] + ([newest] if step else list(range(PROMPT)))
            heads = [attention_to(states, batch, head, newest, rows) for head in range(HEADS)]
            mean = {row: sum(head[i] for head in heads) for i, row in enumerate(rows)}
            while len(rows) > BUDGET:
                rows.remove(min(rows[:-1], key=mean.get))
            there[batch] = rows
            assert kept[batch, 0] == kept[batch, 1] == rows


def test_keydiff_keeps_keys_unlike_the_mean():
    """The smallest cosines with the mean of unit keys; what is decoded stays."""
    keys = random_states()[1]
    expected = {}
    for batch, head in EACH_HEAD:
        units = []
        for key in keys[batch, head, :PROMPT].tolist():
            norm = math.sqrt(sum(x * x for x in key))
            units.append([x / norm for x in key])
        mean = [sum(channel) / PROMPT for channel in zip(*units, strict=True)]
        cosines = [sum(map(float.__mul__, unit, mean)) for unit in units]
        order = sorted(range(PROMPT), key=lambda token, cosines=cosines: cosines[token])
        expected[batch, head] = sorted(order[:BUDGET])
    for step, kept in enumerate(kept_by(f"keydiff:budget={BUDGET}")):
        decoded = list(range(PROMPT, PROMPT + step))
        assert kept == {at: tokens + decoded for at, tokens in expected.items()}


def test_knorm_keeps_the_shortest_keys():
    """The smallest sums of squares; what is decoded stays."""
    keys = random_states()[1]
    expected = {}
    for batch, head in EACH_HEAD:
        squares = [sum(x * x for x in key) for key in keys[batch, head, :PROMPT].tolist()]
        order = sorted(range(PROMPT), key=lambda token, squares=squares: squares[token])
        expected[batch, head] = sorted(order[:BUDGET])
    for step, kept in enumerate(kept_by(f"knorm:budget={BUDGET}")):
        decoded = list(range(PROMPT, PROMPT + step))
        assert kept == {at: tokens + decoded for at, tokens in expected.items()}


def test_the_parts_of_nacl_fill_any_budget():
    """Proportions are the paper's where it gives numbers, and the sum is exact everywhere."""
    assert parts_of(131072 // 5, 256) == (256, 15729, 9175, 1054)
    assert parts_of(20, 256) == (0, 12, 7, 1)
    assert parts_of(1, 256) == (0, 0, 0, 1)
    for budget in range(1, 3000):
        parts = parts_of(budget, 256)
        assert sum(parts) == budget
        assert min(parts) >= 0
        assert parts.recent >= max(parts.sinks, 1)


def proxy_sums(states, batch, kv_head, queries):
    """What the last queries of all tokens attend to, later tokens included."""
    everything = range(states[0].shape[2])
    last = list(everything)[-queries:]
    rows = [group_attention(states, batch, kv_head, asking, everything) for asking in last]
    return [sum(column) for column in zip(*rows, strict=True)]


def test_nacl_keeps_ends_and_proxies_best_and_draws_the_rest():
    """Of 240 tokens 80 are kept: 2 sinks and the last 2, the 48 that the last 2 queries attend to
    most, and 28 others, which another seed draws otherwise.
    """
    tokens, budget = 240, 80
    states = random_states(tokens)
    (kept,) = kept_by(f"nacl:budget={budget}", tokens, states)
    (same,) = kept_by(f"nacl:budget={budget}", tokens, states)
    (other,) = kept_by(f"nacl:budget={budget},seed=1", tokens, states)
    assert kept == same != other
    for (batch, head), chosen in kept.items():
        sums = proxy_sums(states, batch, head, 2)
        between = range(2, tokens - 2)
        best = sorted(between, key=lambda token, sums=sums: -sums[token])[:48]
        sure = {0, 1, tokens - 2, tokens - 1, *best}
        assert chosen == sorted(set(chosen))
        assert len(chosen) == budget
        assert sure <= set(chosen) & set(other[batch, head])
    assert len({tuple(chosen) for chosen in kept.values()}) == len(kept)


def test_nacl_draws_by_the_softmax_of_the_scores():
    """Over many seeds a token is drawn as often as drawing one after another says."""
    tokens, budget, seeds = 8, 5, 400
    queries, keys, values = random_states(tokens)
    states = (
        8 * queries,
        keys,
        values,
    )  # some tokens get nearly all attention, so that odds differ
    parts = parts_of(budget, 0)
    assert parts == (0, 3, 1, 1)
    counts = {at: [0] * tokens for at in EACH_HEAD}
    for seed in range(seeds):
        (kept,) = kept_by(f"nacl:budget={budget},seed={seed}", tokens, states)
        for at, chosen in kept.items():
            for token in chosen:
                counts[at][token] += 1
    for (batch, head), count in counts.items():
        sums = proxy_sums(states, batch, head, 1)
        order = sorted(range(tokens - 1), key=lambda token, sums=sums: -sums[token])
        left = order[parts.best :]
        weights = [math.exp(sums[token]) for token in left]
        for token in range(tokens):
            sure = token == tokens - 1 or token in order[: parts.best]
            odds = 1 if sure else weights[left.index(token)] / sum(weights)
            deviation = math.sqrt(seeds * odds * (1 - odds))
            assert abs(count[token] - seeds * odds) <= 4 * deviation


def test_a_round_of_a_tree_is_one_over_pairs():
    """The example of the docstring, at once and token by token."""
    scores = torch.tensor([[[3.0, 1, 5, 2, 4, 9, 6, 8]]])
    places, cursor = thinned(scores, 4, 0)
    assert scores[0, 0, places[0, 0]].tolist() == [3, 5, 9, 8]
    assert cursor == 0
    assert thinned(scores, 0, 0)[0].shape == (1, 1, 0)


@pytest.mark.parametrize("prompt_tokens", [5, 20, PROMPT])
@pytest.mark.parametrize(("budget", "sinks"), [(BUDGET, 2), (13, 4), (3, 4), (1, 4)])
def test_treekv_thins_pair_by_pair(prompt_tokens, budget, sinks):
    """Token by token and head by head: of the tree and the token that leaves the last ones the next
    pair of neighbours loses the one with less attention on average.
    """
    states = random_states()
    tree = budget // 2
    first = min(sinks, budget - tree - 1)
    last = budget - tree - first
    there = {at: [] for at in EACH_HEAD}
    sums = {at: {} for at in EACH_HEAD}
    counts = {at: {} for at in EACH_HEAD}
    cursors = dict.fromkeys(EACH_HEAD, 0)
    for step, kept in enumerate(kept_by(f"treekv:budget={budget},sinks={sinks}", prompt_tokens)):
        end = prompt_tokens + step
        new = [end - 1] if step else list(range(prompt_tokens))
        for at in EACH_HEAD:
            rows = there[at] + new
            for asking in new[-QUERIES:]:
                seen = [row for row in rows if row <= asking]
                for row, weight in zip(
                    seen, group_attention(states, *at, asking, seen), strict=True
                ):
                    sums[at][row] = sums[at].get(row, 0) + weight
                    counts[at][row] = counts[at].get(row, 0) + 1
            mean = {row: sums[at][row] / counts[at][row] for row in rows}
            kept_rows = []
            for row in rows:
                kept_rows.append(row)
                if row in new or step == 0:
                    cursors[at] = thin_once(kept_rows, mean, (first, tree, last), cursors[at])
            there[at] = kept_rows
        assert kept == there


def thin_once(rows, mean, parts, cursor):
    """One eviction of TreeKV, if there is one token too many; returns the cursor."""
    first, tree, last = parts
    if len(rows) <= first + tree + last:
        return cursor
    if not tree:
        rows.pop(first)
        return cursor
    older, newer = rows[first + cursor], rows[first + cursor + 1]
    rows.remove(newer if mean[older] > mean[newer] else older)
    return (cursor + 1) % tree


class InCache:
    """An attention function for a full cache that goes by what StreamingLLM would have kept: the
    oracle. With `moved`, keys and query are turned back to where they were before rotation, and
    then to their places among the kept ones, by the model's own rotation.
    """

    def __init__(self):
        self.model, self.whole = None, ()
        self.sinks, self.budget, self.moved = 0, 0, False

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Plain attention over what is kept."""
        before = key.shape[2] - 1
        if module.layer_idx not in self.whole or query.shape[2] > 1 or before <= self.budget:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling
            )
        recent = self.budget - self.sinks
        kept = torch.tensor([*range(self.sinks), *range(before - recent, before + 1)])
        key, value = key[:, :, kept], value[:, :, kept]
        if self.moved:
            key = self._turned(self._turned(key, kept, back=True), torch.arange(len(kept)))
            place = torch.tensor([len(kept) - 1])
            query = self._turned(self._turned(query, kept[-1:], back=True), place)
        heads = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(heads, dim=1) for states in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    def _turned(self, states, positions, *, back=False):
        rotary = self.model.model.rotary_emb
        kind = {"layer_type": "full_attention"} if "gemma3" in type(rotary).__module__ else {}
        cos, sin = rotary(states, positions[None], **kind)
        square = (cos[0, 0, 0] ** 2 + sin[0, 0, 0] ** 2).item() if back else 1.0
        apply = __import__(type(rotary).__module__, fromlist=[""]).apply_rotary_pos_emb
        return apply(states, states, cos, -sin if back else sin)[1] / square


in_cache = InCache()
AttentionInterface.register("in_cache_oracle", in_cache)
AttentionMaskInterface.register("in_cache_oracle", sdpa_mask)

ROPE = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def sharp(model_type, **fields):
    """A small model with weights so large that attention tells tokens apart."""
    return tiny_config(model_type, initializer_range=0.3, **fields)


MOVED = {
    "gemma3_text": sharp("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2),
    "llama": sharp("llama"),
    "mistral": sharp("mistral", sliding_window=None),
    "phi3": sharp("phi3", sliding_window=None),
    "phi3 in part": sharp(
        "phi3",
        sliding_window=None,
        hidden_size=64,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "qwen2": sharp("qwen2"),
    "qwen3": sharp("qwen3"),
} | {
    kind: sharp("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4} | fields)
    for kind, fields in ROPE.items()
}


@pytest.mark.parametrize("positions", ["cache", "original"])
@pytest.mark.parametrize("name", MOVED)
def test_sink_window_sees_tokens_where_they_stand(name, positions):
    """Logits are those of a full cache whose kept keys are turned to their places in the cache, or
    left where they were; stored keys are never changed.
    """
    model = build(MOVED[name])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 60, (2, 47), generator=generator)
    pieces = tokens.split([40] + [1] * 7, dim=1)
    chosen = load_strategy(f"sink-window:budget=10,sinks=3,positions={positions}")
    cache = chosen.build(model.config, capacity_tokens=47, prompt_tokens=40)
    full = DynamicCache(config=model.config)
    in_cache.model, in_cache.sinks, in_cache.budget = model, 3, 10
    in_cache.moved = positions == "cache"
    in_cache.whole = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "sinks")]
    assert in_cache.whole
    sinks = None
    for piece in pieces:
        with torch.inference_mode(), chosen.running.attending(model):
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[:, -1]
        model.set_attn_implementation("in_cache_oracle")
        with torch.inference_mode():
            expected = model(input_ids=piece, past_key_values=full, use_cache=True).logits[:, -1]
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        stored = [cache.layers[i].keys[:, :, :3] for i in in_cache.whole]
        sinks = sinks or [keys.clone() for keys in stored]
        assert all(map(torch.equal, stored, sinks))


def test_every_rotation_that_is_known_is_tested():
    """No model type and no kind of RoPE is taken on trust."""
    assert {config["model_type"] for config in MOVED.values()} == set(ROTARY)
    assert {"default", *ROPE} == set(CONSTANT)


@pytest.mark.parametrize("name", MOVED)
def test_positions_matter(name):
    """Moving the sinks is seen in the logits, so that the test above tells the two apart."""
    model = build(MOVED[name])
    tokens = torch.randint(1, 60, (1, 41), generator=torch.Generator().manual_seed(1))
    logits = {}
    for positions in ("cache", "original"):
        chosen = load_strategy(f"sink-window:budget=10,sinks=3,positions={positions}")
        cache = chosen.build(model.config, capacity_tokens=41, prompt_tokens=40)
        with torch.inference_mode(), chosen.running.attending(model):
            for piece in tokens.split([40, 1], dim=1):
                logits[positions] = model(input_ids=piece, past_key_values=cache).logits[:, -1]
    assert (logits["cache"] - logits["original"]).abs().max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("olmo2"),
        tiny_config(
            "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
    ],
    ids=["model type", "kind of RoPE"],
)
def test_unknown_rotations_are_refused(config):
    """With what does work: positions of the text."""
    hf_config = build(config).config
    with pytest.raises(UnsupportedError, match="positions=original"):
        frequencies_of(hf_config)
    settings = {"capacity_tokens": 9, "prompt_tokens": 8}
    with pytest.raises(UnsupportedError):
        load_strategy("sink-window").build(hf_config, **settings)
    load_strategy("sink-window:positions=original").build(hf_config, **settings)


def test_latents_are_refused_when_sized():
    """Their rotated part is not a stored key's half; positions of the text work."""
    config = tiny_config("deepseek_v3")
    sized = {"seq": 20, "engine": "transformers", "kv_dtype": "fp32"}
    with pytest.raises(UnsupportedError, match="positions=original"):
        kvcalc.size(config, strategy="sink-window:budget=10", **sized)
    assert kvcalc.size(config, strategy="sink-window:budget=10,positions=original", **sized)
