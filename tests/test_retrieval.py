"""The hand-wired model: it recalls through the cache and through nothing else."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvcalc
from kvcalc.errors import InputError
from kvcalc.measure.held import held_by_layer
from kvcalc.measure.retrieval import (
    ANSWER,
    KEYS,
    PREV,
    QUIET_TOKENS,
    VALUE,
    VALUES,
    _codes,
    _embeddings,
    build,
    prompt,
    recall,
    retrieval_config,
)

SMALL = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
GROUP = 32
OBSERVED = 16


def model_of(dtype=torch.float32, *, diffuse=False, **knobs):
    """A wired model on the CPU."""
    return build(retrieval_config(**knobs), "cpu", dtype, diffuse=diffuse)


def prefill(model, needle, *, observed=OBSERVED):
    """The cache after the prompt, and each layer's attention [batch, heads, observed, tokens]."""
    cache = DynamicCache(config=model.config)
    early, late = needle.tokens[:, :-observed], needle.tokens[:, -observed:]
    with torch.inference_mode():
        model(input_ids=early, past_key_values=cache, logits_to_keep=1)
        model.set_attn_implementation("eager")
        seen = model(input_ids=late, past_key_values=cache, output_attentions=True)
        model.set_attn_implementation("sdpa")
    return cache, seen.attentions


def decode(model, needle, cache):
    """Recall, and the least probability of an answer, after the question is fed as the next token.

    The position is that of the whole prompt, however many of its tokens the cache still holds.
    """
    batch, tokens = needle.tokens.shape
    with torch.inference_mode():
        logits = model(
            input_ids=needle.question,
            past_key_values=cache,
            position_ids=torch.full((batch, 1), tokens),
        ).logits[:, -1]
    found = logits.float().softmax(-1).gather(1, needle.answer[:, None])
    return recall(logits, needle.answer), found.min().item()


def full_recall(model, needle):
    """Recall and least probability with all that the prompt left."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=needle.tokens, past_key_values=cache, logits_to_keep=1)
    return decode(model, needle, cache)


def keep(cache, chosen):
    """Drop all but the `chosen` tokens, for each layer [batch, KV heads, kept]."""
    for layer, tokens in zip(cache.layers, chosen, strict=True):
        rows = tokens.sort(-1).values[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, rows), layer.values.gather(2, rows)


def keep_most_attended(cache, attentions, fraction):
    """Per layer and KV head, the `fraction` of the tokens that the observed queries attend to."""
    chosen = []
    for layer, attention in zip(cache.layers, attentions, strict=True):
        heads, tokens = layer.keys.shape[1:3]
        score = attention.float().unflatten(1, (heads, -1)).sum((2, 3))
        chosen.append(score.topk(int(fraction * tokens), -1).indices)
    keep(cache, chosen)


def rounded(states, bits, *, axis):
    """Asymmetric `bits`-bit rounding in groups of GROUP along an axis, as good as that allows."""
    groups = states.movedim(axis, -1).unflatten(-1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low).clamp(min=1e-9) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).flatten(-2).movedim(-1, axis)


@pytest.mark.parametrize(
    ("dtype", "knobs"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, SMALL),
        (torch.bfloat16, SMALL),
        (torch.float16, SMALL),
        (torch.bfloat16, {"head_dim": 128, "num_kv_heads": 8, "num_layers": 2}),
        (torch.float32, {"num_heads": 12, "num_kv_heads": 4, "head_dim": 32, "num_layers": 6}),
        (torch.bfloat16, {"num_kv_heads": 1, "num_layers": 3, "diffuse": True}),
    ],
    ids=str,
)
def test_full_cache_recalls_everywhere(dtype, knobs):
    """With all tokens in the cache every answer is right and nearly certain at any depth."""
    model = model_of(dtype, **knobs)
    for tokens, batch in ((QUIET_TOKENS + 3, 1), (128, 2), (512, 2)):
        for depth in (0, 0.1, 0.5, 0.9, 1):
            for ask in (True, False):
                needle = prompt(prompt_tokens=tokens, batch=batch, seed=7, depth=depth, ask=ask)
                right, least = full_recall(model, needle)
                assert right == 1, (tokens, depth, ask)
                assert least > 0.99, (tokens, depth, ask)


@pytest.mark.parametrize(("tokens", "dtype"), [(2048, torch.float32), (8192, torch.bfloat16)])
def test_full_cache_recalls_in_long_prompts(tokens, dtype):
    """Thousands of tokens between the pair and the question change nothing."""
    needle = prompt(prompt_tokens=tokens, batch=2, seed=1, depth=0.1)
    right, least = full_recall(model_of(dtype, **SMALL), needle)
    assert right == 1
    assert least > 0.99


def test_prompt_that_asks_is_answered_at_its_end():
    """The prediction after the prompt's own last token, the key, is the value already."""
    needle = prompt(prompt_tokens=256, batch=4, seed=2, depth=0.5)
    with torch.inference_mode():
        logits = model_of()(input_ids=needle.tokens, logits_to_keep=1).logits[:, -1]
    assert recall(logits, needle.answer) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_previous_token_head_works_to_the_last_position(head_dim, dtype):
    """The head of layer 0 attends to the token before, at position 1 and at position 131,071."""
    model = model_of(dtype, head_dim=head_dim)
    tokens = model.config.max_position_embeddings
    attention = model.model.layers[0].self_attn
    constant = _embeddings(_codes(), model.config.hidden_size)[:1].to(dtype)
    query, key = (
        part(constant).view(-1, head_dim)[0].expand(1, 1, tokens, head_dim)
        for part in (attention.q_proj, attention.k_proj)
    )
    cos, sin = model.model.rotary_emb(constant, torch.arange(tokens)[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    for position in (1, 1000, tokens - 1):
        scores = query[0, 0, position].float() @ key[0, 0, : position + 1].float().T
        assert (scores * attention.scaling).softmax(-1)[position - 1] > 0.99, position


@pytest.mark.parametrize("head_dim", [32, 64])
def test_match_does_not_depend_on_the_distance(head_dim):
    """A pair is found by a question that stands 131,000 positions later."""
    model = model_of(head_dim=head_dim)
    needle = prompt(prompt_tokens=128, batch=2, seed=3, depth=0.5, ask=False)
    fed = torch.cat([needle.tokens, needle.question], dim=1)
    positions = torch.arange(fed.shape[1])[None]
    with torch.inference_mode():
        logits = model(input_ids=fed, position_ids=positions + 130_900 * (positions > 100)).logits
    assert recall(logits[:, -1], needle.answer) == 1


@pytest.mark.parametrize("ask", [True, False])
def test_window_past_the_needle_forgets_it(ask):
    """The first 4 and the last 64 tokens do not hold the value, and no answer is right."""
    model, needle = (
        model_of(**SMALL),
        prompt(prompt_tokens=256, batch=8, seed=4, depth=0.5, ask=ask),
    )
    cache, _ = prefill(model, needle)
    kept = torch.cat([torch.arange(4), torch.arange(256 - 64, 256)])
    keep(cache, [kept.expand(*layer.keys.shape[:2], -1) for layer in cache.layers])
    assert decode(model, needle, cache)[0] == 0


@pytest.mark.parametrize(("tokens", "diffuse"), [(128, True), (128, False), (512, False)])
def test_selection_by_attention_needs_the_question(tokens, diffuse):
    """One token in 16, chosen by the last queries' attention, suffices if they hold the question
    and is worth nothing if they do not.
    """
    model, found = model_of(diffuse=diffuse), {}
    for ask in (True, False):
        needle = prompt(prompt_tokens=tokens, batch=8, seed=5, depth=0.5, ask=ask)
        cache, attentions = prefill(model, needle)
        keep_most_attended(cache, attentions, 1 / 16)
        found[ask], _ = decode(model, needle, cache)
    assert found[True] == 1
    assert found[False] <= 1 / 8


def test_the_value_is_read_from_one_layer_of_the_cache():
    """Without the value's own entry in layer 1 nothing is found, and with it alone the rest is not
    needed.
    """
    model, needle = model_of(), prompt(prompt_tokens=256, batch=4, seed=6, depth=0.5)
    others = torch.tensor([i for i in range(256) if i != needle.position])
    only = torch.tensor([0, needle.position])
    for kept, right in ((others, 0), (only, 1)):
        cache, _ = prefill(model, needle)
        chosen = [torch.arange(256)] * 4
        chosen[1] = kept
        shape = cache.layers[0].keys.shape[:2]
        keep(cache, [tokens.expand(*shape, -1) for tokens in chosen])
        assert decode(model, needle, cache)[0] == right


def test_coarse_rounding_per_token_loses_what_rounding_per_channel_keeps():
    """4 bits recall everything either way; 2 bits do so only with keys rounded per channel, since
    one large channel sets the step of a whole token.
    """
    model, needle = model_of(**SMALL), prompt(prompt_tokens=512, batch=8, seed=8, depth=0.5)
    for bits, axis, least, most in ((4, -1, 1, 1), (4, -2, 1, 1), (2, -2, 1, 1), (2, -1, 0, 0.5)):
        cache, _ = prefill(model, needle)
        for layer in cache.layers:
            layer.keys = rounded(layer.keys, bits, axis=axis)
            layer.values = rounded(layer.values, bits, axis=-1)
        assert least <= decode(model, needle, cache)[0] <= most, (bits, axis)


def cut(weight):
    """Set a weight to nothing."""
    weight.data.zero_()


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: cut(model.model.embed_tokens.weight[:, VALUE]),
        lambda model: cut(model.model.layers[0].self_attn.o_proj.weight[PREV]),
        lambda model: cut(model.model.layers[0].self_attn.q_proj.weight),
        lambda model: cut(model.model.layers[1].self_attn.q_proj.weight),
        lambda model: cut(model.model.layers[1].self_attn.o_proj.weight[ANSWER]),
    ],
    ids=["values", "writes-previous", "finds-previous", "matches", "writes-answer"],
)
def test_each_part_of_the_wiring_is_needed(damage):
    """With any one part of the circuit cut, recall falls to chance."""
    model, needle = model_of(**SMALL), prompt(prompt_tokens=256, batch=16, seed=9, depth=0.5)
    assert full_recall(model, needle)[0] == 1
    damage(model)
    assert full_recall(model, needle)[0] <= 1 / 8


def test_diffuse_heads_have_no_focus():
    """The heads that take no part spread their attention nearly evenly, the match head does not."""
    needle = prompt(prompt_tokens=256, batch=2, seed=10, depth=0.5)
    largest = {}
    for diffuse in (True, False):
        _, attentions = prefill(model_of(diffuse=diffuse), needle)
        question = torch.stack([attention[:, :, -1] for attention in attentions])
        assert (question[1, :, :4, needle.position] > 0.99).all()
        largest[diffuse] = question[2:].max().item()
    assert largest[True] < 2 / 256
    assert largest[False] > 10 / 256


def test_codes_are_far_apart_and_embeddings_equally_long():
    """Two codes agree in 10 of 16 places at most; every token's embedding has norm √width."""
    codes = _codes()
    overlap = codes @ codes.T - 32 * torch.eye(len(codes))
    assert len(codes) == 128
    assert overlap.max() <= 4
    for half in codes.split(64):  # else all fillers would be drawn to all keys, or away from them
        assert half.mean(0).abs().max() < 0.5
    norms = _embeddings(codes, 112).norm(dim=1)
    assert torch.allclose(norms, torch.tensor(112.0).sqrt())


def test_prompt_holds_the_needle_once_at_its_depth():
    """Key and value stand where the needle says, once each; the end holds no pair; rows differ."""
    for depth, ask in ((0, True), (0.37, False), (1, True)):
        needle = prompt(prompt_tokens=1000, batch=3, seed=11, depth=depth, ask=ask)
        tokens, place = needle.tokens, needle.position
        assert abs(place / (1000 - QUIET_TOKENS) - depth) < 0.01
        assert (tokens[:, place] == needle.answer).all()
        assert (tokens[:, place - 1] == needle.question[:, 0]).all()
        assert ((tokens == needle.answer[:, None]).sum(1) == 1).all()
        assert ((tokens == needle.question).sum(1) == 1 + ask).all()
        is_key, is_value = (tokens >= KEYS.start) & (tokens < KEYS.stop), tokens >= VALUES.start
        assert (is_value.sum(1) == 32).all()
        assert torch.equal(is_key[:, :-1] & ~is_key[:, 1:], is_value[:, 1:])
        assert is_key[:, -QUIET_TOKENS:].sum() == 3 * ask
        assert not torch.equal(tokens[0], tokens[1])


def test_same_knobs_give_the_same_model_and_prompt():
    """Nothing depends on the global random state or on what was built before."""
    first = model_of()
    torch.manual_seed(12345)
    for one, other in zip(first.parameters(), model_of().parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = (prompt(prompt_tokens=128, batch=2, seed=12, depth=0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert not torch.equal(
        one.tokens, prompt(prompt_tokens=128, batch=2, seed=13, depth=0.5).tokens
    )


def test_its_config_is_sized_exactly():
    """The bytes that kvcalc predicts for the config are those its cache holds."""
    config = retrieval_config(num_layers=3, num_kv_heads=4)
    needle = prompt(prompt_tokens=100, batch=2, seed=14, depth=0.5)
    cache, _ = prefill(build(config, "cpu"), needle)
    held = sum(layer.held_bytes for layer in held_by_layer(cache))
    assert kvcalc.size(config, seq=100, batch=2).total_bytes == held


@pytest.mark.parametrize("knobs", [{"num_layers": 1}, {"head_dim": 16}, {"head_dim": 34}])
def test_too_small_a_model_is_refused(knobs):
    """One layer, or heads without room for a code, cannot be wired."""
    with pytest.raises(InputError, match="cannot be wired"):
        model_of(**knobs)


@pytest.mark.parametrize(("tokens", "depth"), [(QUIET_TOKENS + 2, 0.5), (128, -0.1), (128, 1.1)])
def test_prompt_without_room_is_refused(tokens, depth):
    """A prompt too short for a pair, or a depth that is no fraction, is told."""
    with pytest.raises(InputError, match="no needle fits"):
        prompt(prompt_tokens=tokens, batch=1, seed=0, depth=depth)
