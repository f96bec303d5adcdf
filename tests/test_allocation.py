"""How one budget is spread over heads and layers, each allocator held against a plain reading of
its paper: loops over fixed queries, keys and values. Which of them recalls what uniform budgets
lose is told with the wired model.
"""

import math
import sys
from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evicting import promised, run, spec_of
from tiny import tiny_config
from transformers import AutoConfig

import kvcalc
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.families import describe
from kvcalc.layers import FullAttention
from kvcalc.measure import retrieval
from kvcalc.measure.held import held_by_layer
from kvcalc.measure.models import WIRED, LoadedModel
from kvcalc.measure.session import Session, few_objects, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.strategies import load_strategy
from kvcalc.strategies._apportion import apportion
from kvcalc.strategies._evicting_cache import attention
from kvcalc.strategies.pyramidkv import layer_budgets

LAYERS, BATCH, QUERY_HEADS, HEADS, WIDTH, TOKENS = 6, 2, 4, 2, 8, 40
WINDOW, BUDGET, KERNEL = 4, 12, 3
BEFORE, EACH = TOKENS - WINDOW, BUDGET - WINDOW
SHARED = f"budget={BUDGET},window={WINDOW},kernel={KERNEL}"
ALPHA = Fraction(1, 5)


@pytest.fixture(autouse=True, scope="module")
def few():
    """Each run collects garbage, which need not go through all that other tests have made."""
    with few_objects():
        yield


wholes = st.integers(0, 60)
places = st.lists(st.tuples(wholes, wholes), min_size=1, max_size=9)


def wanted(shares, total, caps):
    """Of each place min(cap, level × share), the level such that they add up to the total; where
    the shares of all that are below their caps are zero, these are filled evenly.
    """
    left, places = Fraction(min(total, sum(caps))), set(range(len(shares)))
    parts = [Fraction(0)] * len(shares)
    while places:
        weights = {place: Fraction(shares[place]) for place in places}
        if not sum(weights.values()):
            weights = dict.fromkeys(places, Fraction(1))
        level = left / sum(weights.values())
        tightest = min(places, key=lambda place: (caps[place] - level * weights[place], place))
        if level * weights[tightest] < caps[tightest]:
            for place in places:
                parts[place] = level * weights[place]
            break
        parts[tightest] = Fraction(caps[tightest])
        left -= caps[tightest]
        places.remove(tightest)
    return parts


def rounded(shares, total, caps):
    """What is wanted, in whole parts: the largest remainders are rounded up, the earlier first."""
    parts = wanted(shares, total, caps)
    whole = [math.floor(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda place: (whole[place] - parts[place], place))
    for place in order[: min(total, sum(caps)) - sum(whole)]:
        whole[place] += 1
    return whole


@given(places, st.integers(0, 300))
def test_parts_add_up_within_their_caps(pairs, total):
    """The sum is the total, or all there is room for; no part is above its cap or below 0."""
    shares, caps = zip(*pairs, strict=True)
    parts = apportion(shares, total, caps)
    assert sum(parts) == min(total, sum(caps))
    assert all(0 <= part <= cap for part, cap in zip(parts, caps, strict=True))


@given(places, st.integers(0, 300))
def test_the_largest_remainders_are_rounded_up(pairs, total):
    """Each part is what is wanted in proportion, rounded; of equal remainders the first is up."""
    shares, caps = zip(*pairs, strict=True)
    assert apportion(shares, total, caps) == rounded(shares, total, caps)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(0, 10**9))
def test_fractions_of_any_size_are_shares(shares, total):
    """Shares that are no whole numbers, and tiny beside each other, add up, too."""
    assert sum(apportion(shares, total, [total] * len(shares))) == total


@given(
    st.integers(1, 30), st.integers(1, 300), st.integers(1, 64), st.integers(1, 40), st.integers(1)
)
def test_a_pyramid_holds_what_even_layers_do(window, more, places, beta, prompt_tokens):
    """Budgets add up to that of even layers; none is above the prompt, below the window, or above
    that of an earlier layer.
    """
    budget = window + more
    budgets = layer_budgets(
        budget, window=window, beta=beta, places=places, prompt_tokens=prompt_tokens
    )
    assert sum(budgets) == places * min(budget, prompt_tokens)
    assert max(budgets) <= prompt_tokens
    assert min(budgets) >= min(window, prompt_tokens)
    assert list(budgets) == sorted(budgets, reverse=True)


def plain_budgets(budget, window, beta, places, prompt_tokens):
    """PyramidKV's line in fractions of the floats it is made of, and largest remainders."""
    if prompt_tokens <= budget:
        return [prompt_tokens] * places
    before, average = prompt_tokens - window, budget - window
    most = min(2 * average - average / beta, before)
    least = 2 * average - most
    line = [Fraction(most - (most - least) * place / max(places - 1, 1)) for place in range(places)]
    parts, left, open_places = [0] * places, places * average, list(range(places))
    while open_places:
        weight = sum(line[place] for place in open_places)
        if not weight:
            line = [Fraction(1)] * places
            continue
        full = [place for place in open_places if left * line[place] >= before * weight]
        if not full:
            break
        for place in full:
            parts[place] = before
            left -= before
            open_places.remove(place)
    wanted = {place: left * line[place] / weight for place in open_places}
    for place, share in wanted.items():
        parts[place] = int(share)
        left -= int(share)
    for place in sorted(wanted, key=lambda place: wanted[place] % 1, reverse=True)[:left]:
        parts[place] += 1
    return [window + part for part in parts]


@given(
    st.integers(1, 30), st.integers(1, 300), st.integers(1, 64), st.integers(1, 40), st.integers(1)
)
def test_a_pyramid_is_that_of_its_definition(window, more, places, beta, prompt_tokens):
    """Every layer of every shape keeps what the definition, written plainly, gives it."""
    shape = {"window": window, "beta": beta, "places": places, "prompt_tokens": prompt_tokens}
    assert list(layer_budgets(window + more, **shape)) == plain_budgets(window + more, **shape)


@pytest.mark.parametrize("strategy", ["pyramidkv", "pyramidkv+int4:group=4", "minicache", "snapkv"])
def test_the_work_grows_with_the_layers(strategy):
    """Four times the layers are four times the lines of Python, not sixteen: no list of all is made
    for each of them.
    """
    counts = {}
    for num_layers in (500, 2000):
        config = tiny_config("llama", num_hidden_layers=num_layers, num_key_value_heads=HEADS)
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            del argument
            lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            kvcalc.size(config, seq=4096 + num_layers, strategy=strategy)
        finally:
            sys.settrace(before)
        counts[num_layers] = lines
    assert counts[2000] < 6 * counts[500]


class Fixed:
    """Stands for a model: whatever it is fed, layers attend with the same queries, keys and values,
    some of them more sharply.
    """

    sharpness = (6, 1, 3, 2, 1, 4)

    config = AutoConfig.for_model(
        **tiny_config("llama", num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
    )

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def drawn(heads):
            return torch.randn(BATCH, heads, TOKENS, WIDTH, generator=generator)

        self.layers = [
            (drawn(QUERY_HEADS) * factor, drawn(HEADS), drawn(HEADS)) for factor in self.sharpness
        ]

    def forward(self, input_ids, past_key_values, **settings):
        """A prompt, through the attention of all layers."""
        del input_ids, settings
        for _ in self.layer_by_layer(past_key_values):
            pass
        return SimpleNamespace(logits=torch.zeros(BATCH, 1, 1))

    __call__ = forward

    def layer_by_layer(self, past_key_values):
        """The same; yields after each layer how many it were."""
        module = torch.nn.Module()
        module.num_key_value_groups = QUERY_HEADS // HEADS
        for place, (query, key, value) in enumerate(self.layers):
            rows = past_key_values.update(key, value, place)
            attention(module, query, *rows, None)
            yield place + 1


@cache
def fixed():
    """The one of these tests."""
    return Fixed()


PROMPT = torch.zeros(BATCH, TOKENS, dtype=torch.long)


def empty(spec):
    """A cache for it."""
    return load_strategy(spec).build(Fixed.config, capacity_tokens=TOKENS, prompt_tokens=TOKENS)


def fill(spec, cache):
    """Feed the prompt; returns for each layer which tokens stay [batch, heads, tokens]."""
    for layer in cache.layers:
        layer.kept = []
    prefill = getattr(load_strategy(spec).running, "prefill", None)
    if prefill:
        prefill(fixed(), cache, PROMPT)
    else:
        fixed()(PROMPT, cache)
    return [layer.kept[-1].tolist() for layer in cache.layers]


@cache
def window_weights():
    """What each query of the window attends to: [layer][sequence][query head][query][token]."""
    return [
        [
            [
                [
                    softmax(dots(query[at], key[: at + 1])) + [0] * (TOKENS - 1 - at)
                    for at in range(BEFORE, TOKENS)
                ]
                for query, key in zip(queries, keys_of_queries(keys), strict=True)
            ]
            for queries, keys in zip(query.tolist(), key.tolist(), strict=True)
        ]
        for query, key, _ in fixed().layers
    ]


def keys_of_queries(keys):
    """Those of each query head."""
    return [keys[head // (QUERY_HEADS // HEADS)] for head in range(QUERY_HEADS)]


def dots(query, keys):
    """Scaled products."""
    return [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(WIDTH) for key in keys]


def softmax(logits):
    """Weights that add up to one."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def pool(scores, pooling):
    """Largest, or sum over the kernel's width, of a token and its neighbours."""
    pooled = []
    for at in range(len(scores)):
        near = scores[max(at - KERNEL // 2, 0) : at + KERNEL // 2 + 1]
        pooled.append(max(near) if pooling == "max" else sum(near) / KERNEL)
    return pooled


def groups(heads):
    """Query heads by the KV head that they share."""
    size = QUERY_HEADS // HEADS
    return [heads[start : start + size] for start in range(0, QUERY_HEADS, size)]


@cache
def scores_of(pooling):
    """Of the tokens before the window [layer][sequence][KV head][token]: what the queries of the
    window, and of the heads of a group, attend to on average, pooled. A sum orders them alike.
    """
    return [
        [
            [
                pool(
                    [
                        sum(weights[query][token] for weights in group for query in range(WINDOW))
                        / (WINDOW * len(group))
                        for token in range(BEFORE)
                    ],
                    pooling,
                )
                for group in groups(heads)
            ]
            for heads in layer
        ]
        for layer in window_weights()
    ]


def check_kept(kept, scores, counts):
    """Of each head the window stays, and so many tokens before it, none worse than one that goes.

    All three are [layer][sequence][head]; `scores` and `kept` then have one for each token.
    """
    for stays, score, count in zip(flat(kept), flat(scores), flat(counts), strict=True):
        assert all(stays[BEFORE:])
        inside = [score[token] for token in range(BEFORE) if stays[token]]
        outside = [score[token] for token in range(BEFORE) if not stays[token]]
        assert len(inside) == count
        if inside and outside:
            assert min(inside) >= max(outside) * (1 - 1e-5)


def flat(nested):
    """Layers, sequences and heads in one row."""
    return [head for layer in nested for sequence in layer for head in sequence]


def of_all_heads(by_layer):
    """Budgets [layer][sequence] for each head."""
    return [[[budget] * HEADS for budget in layer] for layer in by_layer]


def test_snapkv_keeps_the_best_of_each_head():
    """The same number everywhere."""
    spec = f"snapkv:{SHARED}"
    counts = of_all_heads([[EACH] * BATCH] * LAYERS)
    check_kept(fill(spec, empty(spec)), scores_of("max"), counts)


@pytest.mark.parametrize("beta", [1, 2, 20])
def test_pyramidkv_keeps_the_best_of_each_head(beta):
    """As many as the line has at the layer's place: from the first to the last layer it falls from
    2 × 8 - 8 / beta to 8 / beta, rounded.
    """
    spec = f"pyramidkv:{SHARED},beta={beta}"
    least = Fraction(EACH, beta)
    most = 2 * EACH - least
    line = [most - place * (most - least) / (LAYERS - 1) for place in range(LAYERS)]
    budgets = rounded(line, EACH * LAYERS, [BEFORE] * LAYERS)
    check_kept(
        fill(spec, empty(spec)),
        scores_of("max"),
        of_all_heads([[budget] * BATCH for budget in budgets]),
    )


def split_heads(scores, budget, caps):
    """Ada-KV: of all heads' scores [head][token] the best, counted by head, and a part evenly."""
    owned = sorted(((score, head) for head in range(HEADS) for score in scores[head]), reverse=True)
    hits = [0] * HEADS
    for _, head in owned[: HEADS * budget]:
        hits[head] += 1
    shares = [(1 - ALPHA) * count + ALPHA * budget for count in hits]
    return rounded(shares, HEADS * budget, caps)


def test_ada_kv_splits_a_layer_by_its_best_scores():
    """Each layer of each sequence keeps KV heads × budget tokens, the heads unlike numbers."""
    spec = f"ada-kv:{SHARED},alpha=0.2"
    cache = empty(spec)
    kept = fill(spec, cache)
    scores = scores_of("max")
    counts = [
        [split_heads(heads, EACH, [BEFORE] * HEADS) for heads in sequences] for sequences in scores
    ]
    check_kept(kept, scores, counts)
    for layer in cache.layers:
        assert [sum(heads) for heads in layer.head_lengths] == [HEADS * BUDGET] * BATCH
    observed = load_strategy(spec).running.observed(cache)
    assert observed["fewest_tokens_of_a_head"] == WINDOW + min(flat(counts))
    assert observed["most_tokens_of_a_head"] == WINDOW + max(flat(counts))
    assert observed["fewest_tokens_of_a_layer"] == observed["most_tokens_of_a_layer"] == BUDGET
    assert min(flat(counts)) < max(flat(counts))


def sums(cache):
    """Rows of all layers and heads together, for each sequence."""
    return [
        sum(sum(layer.head_lengths[sequence]) for layer in cache.layers)
        for sequence in range(BATCH)
    ]


def dynamickv_budgets(scores, every, r_max):
    """[layer] of one sequence's scores [layer][head][token]."""
    kept = []
    for place in range(LAYERS):
        kept.append(min(r_max * EACH, BEFORE))
        if (place + 1) % every == 0 or place == LAYERS - 1:
            owned = [
                (score, layer)
                for layer in range(place + 1)
                for head in scores[layer]
                for score in head
            ]
            best = sorted(owned, reverse=True)[: EACH * HEADS * (place + 1)]
            shares = [sum(layer == owner for _, owner in best) for layer in range(place + 1)]
            kept = rounded(shares, EACH * LAYERS, kept)
    return kept


@pytest.mark.parametrize(("every", "r_max"), [(4, 10), (4, 2), (1, 3), (8, 2)])
def test_dynamickv_spreads_by_the_best_scores_so_far(every, r_max):
    """Every so many layers those so far are trimmed; what a layer lost it does not get back."""
    spec = f"dynamickv:{SHARED},every={every},r_max={r_max}"
    scores = scores_of("avg")
    by_sequence = [
        dynamickv_budgets([layer[sequence] for layer in scores], every, r_max)
        for sequence in range(BATCH)
    ]
    check_layers(spec, scores, by_sequence)


def xkv_budgets(scores):
    """[layer] of one sequence's scores [layer][head][token]: a token at a time."""
    best = [[sorted(head, reverse=True) for head in heads] for heads in scores]
    totals = [sum(map(sum, heads)) for heads in scores]
    kept = [0] * LAYERS
    for _ in range(LAYERS * EACH):
        gains = [
            sum(head[kept[layer]] for head in best[layer]) / totals[layer]
            if kept[layer] < BEFORE
            else -1
            for layer in range(LAYERS)
        ]
        kept[gains.index(max(gains))] += 1
    return kept


def test_xkv_gives_each_token_where_it_gains_most():
    """One at a time, to the layer whose next best is the largest part of its own sum."""
    spec = f"xkv:{SHARED}"
    scores = scores_of("avg")
    by_sequence = [xkv_budgets([layer[sequence] for layer in scores]) for sequence in range(BATCH)]
    check_layers(spec, scores, by_sequence)


def check_layers(spec, scores, by_sequence):
    """The budgets [sequence][layer] are those of all heads of a layer, and unlike."""
    cache = empty(spec)
    kept = fill(spec, cache)
    by_layer = list(zip(*by_sequence, strict=True))
    check_kept(kept, scores, of_all_heads(by_layer))
    assert sums(cache) == [LAYERS * HEADS * BUDGET] * BATCH
    observed = load_strategy(spec).running.observed(cache)
    assert observed["fewest_tokens_of_a_layer"] == WINDOW + min(map(min, by_layer))
    assert observed["most_tokens_of_a_layer"] == WINDOW + max(map(max, by_layer))
    assert len(set(by_sequence[0])) > 1


@cache
def lava_scores():
    """As Ada-KV's, each query head's times the largest |V|₁ of its values before the window, and of
    a group the largest.
    """
    result = []
    for layer, (_, _, value) in zip(window_weights(), fixed().layers, strict=True):
        sequences = []
        for heads, values in zip(layer, value.tolist(), strict=True):
            norms = [max(sum(map(abs, row)) for row in rows[:BEFORE]) for rows in values]
            kv_heads = []
            for head, group in enumerate(groups(heads)):
                pooled = [
                    pool([sum(column) / WINDOW for column in zip(*weights, strict=True)], "max")
                    for weights in ([query[:BEFORE] for query in each] for each in group)
                ]
                kv_heads.append([norms[head] * max(each) for each in zip(*pooled, strict=True)])
            sequences.append(kv_heads)
        result.append(sequences)
    return result


def lava_counts(scores):
    """[layer][head] of one sequence's scores [layer][head][token]."""
    kept, entropies = [], []
    for place in range(LAYERS):
        kept.append([BEFORE] * HEADS)
        total = sum(map(sum, scores[place]))
        parts = [score / total for head in scores[place] for score in head]
        entropies.append(-sum(part * math.log(part) for part in parts) / math.log(len(parts)))
        budgets = rounded(entropies, EACH * LAYERS, [sum(heads) // HEADS for heads in kept])
        kept = [
            split_heads(scores[layer], budget, kept[layer]) for layer, budget in enumerate(budgets)
        ]
    return kept


def test_lava_spreads_by_entropy_and_splits_by_weighed_scores():
    """After each layer all layers so far are trimmed to their part, and the heads of each."""
    spec = f"lava:{SHARED},alpha=0.2"
    cache = empty(spec)
    kept = fill(spec, cache)
    scores = lava_scores()
    by_sequence = [lava_counts([layer[sequence] for layer in scores]) for sequence in range(BATCH)]
    counts = list(zip(*by_sequence, strict=True))
    check_kept(kept, scores, counts)
    assert sums(cache) == [LAYERS * HEADS * BUDGET] * BATCH
    assert len({sum(heads) for heads in by_sequence[0]}) > 1


def test_prompts_pass_within_a_bound():
    """Of tokens before the window, LAVa never holds more after a layer than the whole budget, and
    DynamicKV, which trims every second layer here, three times its budget for each layer since.
    """
    total = LAYERS * EACH
    for spec, since in (("lava", (0,) * LAYERS), ("dynamickv", (1, 0) * (LAYERS // 2))):
        more = ",every=2,r_max=3" if spec == "dynamickv" else ""
        cache = empty(f"{spec}:{SHARED}{more}")
        held = []
        for done in fixed().layer_by_layer(cache):
            counts = [layer.counts[0] for layer in cache.layers[:done]]
            held.append(sum(map(sum, counts)) / HEADS)
        bounds = [total + 3 * EACH * layers for layers in since]
        assert all(rows <= bound for rows, bound in zip(held, bounds, strict=True))
        assert max(held) == max(bounds)
        assert held[-1] == total


ALLOCATORS = ("dynamickv", "xkv", "lava")


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_cache_can_be_used_again(name):
    """After a reset it keeps the same of the same prompt, and nothing is left of the first."""
    spec = f"{name}:{SHARED}"
    cache = empty(spec)
    once = fill(spec, cache)
    cache.reset()
    assert all(not layer.plan for layer in cache.layers)
    assert fill(spec, cache) == once


def test_xkv_without_its_prefill_is_refused():
    """A prompt that comes past `prefill` finds no budgets; one within the budget needs none."""
    with pytest.raises(UnsupportedError, match="prefill"):
        fixed()(PROMPT, empty(f"xkv:{SHARED}"))
    fixed()(PROMPT, empty(f"xkv:budget={TOKENS},window={WINDOW}"))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_layers_of_unlike_shapes_cannot_share(name):
    """Which of them a token goes to would decide over the bytes."""
    chosen = load_strategy(name)
    wide, narrow = (FullAttention(kv_heads=heads, key_dim=8, value_dim=8) for heads in (4, 2))
    chosen.check([wide, wide])
    with pytest.raises(UnsupportedError, match=r"KV heads are \[2, 4\]"):
        chosen.check([wide, narrow])


@pytest.mark.parametrize(
    "spec",
    [
        "ada-kv:alpha=1.5",
        "ada-kv:kernel=6",
        "dynamickv:every=0",
        "dynamickv:r_max=0",
        "lava:alpha=2",
        "lava:window=0",
        "pyramidkv:beta=0",
        "xkv:kernel=0",
    ],
)
def test_parameters_out_of_range_are_refused(spec):
    """Before anything is sized or run."""
    with pytest.raises(InputError, match=spec.partition(":")[0]):
        load_strategy(spec).check([FullAttention(kv_heads=2, key_dim=8, value_dim=8)])


def test_a_pyramid_can_be_packed():
    """Each layer holds its own number of rows, packed by another strategy."""
    spec = spec_of("pyramidkv+int4")
    for decoded, (session, _) in enumerate(run("llama", spec, 37, 2, 3)):
        if decoded:
            held = [layer.held_bytes for layer in held_by_layer(session.cache)]
            assert held == promised("llama", spec, 37, decoded, 2)
    assert len(set(held)) > 1


QUESTIONS, PROMPTS, LONG = 24, 2, 512
OBSERVING = "window=32,kernel=7,pooling=max"


@cache
def wired(**knobs):
    """A small model in which one head of one layer retrieves, the second; the others attend to
    everything almost evenly.
    """
    config = retrieval.retrieval_config(num_heads=2, num_kv_heads=2, head_dim=32, **knobs)
    model = retrieval.build(config, "cpu", diffuse=True)
    return LoadedModel(
        model=model,
        name="built-in",
        architecture=describe(config),
        origin=None,
        device=torch.device("cpu"),
        dtype="fp32",
        weights=WIRED,
    )


@cache
def asked():
    """Prompts whose last tokens are keys of theirs [batch, tokens], once for each of these keys,
    which is the question [batch, 1] and has an answer [batch].
    """
    needle = retrieval.prompt(prompt_tokens=LONG, batch=PROMPTS, seed=0, depth=0.5, ask=False)
    prompts, questions, answers = [], [], []
    for tokens in needle.tokens:
        keys = [at for at, token in enumerate(tokens) if token in retrieval.KEYS][:QUESTIONS]
        tokens[-QUESTIONS:] = tokens[keys]
        prompts.append(tokens.expand(QUESTIONS, -1))
        questions.append(tokens[keys, None])
        answers.append(tokens[[at + 1 for at in keys]])
    return torch.cat(prompts), torch.cat(questions), torch.cat(answers)


@cache
def recall(name, budget, num_layers=4):
    """Fraction of the questions that are answered in a decode step of their own."""
    prompts, questions, answers = asked()
    loaded, chosen = (
        wired(num_layers=num_layers),
        load_strategy(f"{name}:budget={budget},{OBSERVING}"),
    )
    with undisturbed(loaded, chosen):
        session = Session(loaded, chosen, Workload(LONG, 1, len(prompts), 1, 0, 0))
        session.prefill(prompts)
        return retrieval.recall(session.decode(questions), answers)


@pytest.mark.parametrize("budget", [64, 96])
def test_budgets_of_heads_recall_more_where_one_head_retrieves(budget):
    """24 questions in the window: Ada-KV, and LAVa whose heads share alike, find clearly more than
    SnapKV at the same bytes.
    """
    assert recall("ada-kv", budget) >= recall("snapkv", budget) + 0.12
    assert recall("lava", budget) >= recall("snapkv", budget) + 0.12


@pytest.mark.parametrize("name", ["dynamickv", "xkv"])
def test_budgets_of_layers_recall_more_where_one_layer_retrieves(name):
    """Of four layers one retrieves, and gets most of the budget."""
    assert recall(name, 64) >= recall("snapkv", 64) + 0.5


def test_a_pyramid_is_right_about_early_layers_only():
    """Where the second of eight layers retrieves it finds more than even budgets, where the last of
    two does, less.
    """
    assert recall("pyramidkv", 64, num_layers=8) > recall("snapkv", 64, num_layers=8)
    assert recall("pyramidkv", 96, num_layers=2) < recall("snapkv", 96, num_layers=2) / 2
