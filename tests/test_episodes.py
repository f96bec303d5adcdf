"""EpiCache's blocks, episodes and questions, and the probe's regression."""

import pytest
import torch
from test_evicting import alive_after, loaded, masked, promised, tokens_of
from transformers import DynamicCache

import kvcalc
from kvcalc.measure.held import held_by_layer
from kvcalc.measure.session import Session, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.strategies import load_strategy
from kvcalc.strategies.epicache.cache import EpisodeStorage, find_episodes
from kvcalc.strategies.probe.cache import ridge

SPEC = "epicache:budget=12,chunk=8,episodes={},segment=4,sinks=2"


def session_of(model_name, spec, prompt_tokens, batch, decode_tokens):
    """A session that has been fed nothing."""
    workload = Workload(prompt_tokens, decode_tokens, batch, 1, 0, 0)
    return Session(loaded(model_name), load_strategy(spec), workload)


def test_segments_of_two_topics_are_two_episodes():
    """Segments around two directions fall apart into these, and the medoid is one of them."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(2, 16, generator=generator)
    which = torch.tensor([0, 1, 1, 0, 1, 0])
    embedded = topics[which].repeat_interleave(5, dim=0)
    embedded = embedded + 0.1 * torch.randn(embedded.shape, generator=generator)
    tokens = torch.arange(30)[None]
    found = find_episodes(embedded[None], tokens, segment=5, episodes=2)
    medoids = [which[medoid[0] // 5].item() for medoid in found.medoids[0]]
    assert sorted(medoids) == [0, 1]
    torch.testing.assert_close(found.centres.norm(dim=-1), torch.ones(1, 2))


def test_a_prompt_shorter_than_a_segment_is_one():
    """Its only segment is the typical one of every episode."""
    found = find_episodes(torch.randn(1, 3, 8), torch.arange(3)[None], segment=10, episodes=2)
    assert found.medoids.tolist() == [[[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize("model_name", ["llama", "phi3", "deepseek_v3"])
def test_blocks_see_what_was_kept_of_those_before_them(model_name):
    """With one episode logits are those of a full cache fed in blocks, whose dropped tokens are
    hidden from the blocks and tokens after.
    """
    prompt_tokens, batch, decode_tokens = 30, 2, 3
    tokens = tokens_of(batch, prompt_tokens + decode_tokens)
    model, spec = loaded(model_name), SPEC.format(1)
    records = {}
    with undisturbed(model, load_strategy(spec)):
        session = session_of(model_name, spec, prompt_tokens, batch, decode_tokens)
        for index, layer in enumerate(session.cache.layers):
            records[index] = layer.kept = []
        logits = [session.prefill(tokens[:, :prompt_tokens])]
        logits += [session.decode(one) for one in tokens[:, prompt_tokens:].split(1, dim=1)]
    full, seen = DynamicCache(config=model.model.config), 0
    expected = []
    model.model.set_attn_implementation("masked_oracle")
    try:
        for piece in (8, 8, 8, 6, 1, 1, 1):
            evictions = max(-(-min(seen, prompt_tokens) // 8) - 1, 0)
            masked.alive = {
                index: alive
                for index, kept in records.items()
                if (alive := alive_after(kept[:evictions], seen)) is not None
            }
            block = tokens[:, seen : seen + piece]
            with torch.no_grad():
                output = model.model(input_ids=block, past_key_values=full, use_cache=True)
            expected.append(output.logits[:, -1])
            seen += piece
    finally:
        model.model.set_attn_implementation("sdpa")
        masked.alive = {}
    assert all(len(kept) == 3 for kept in records.values())
    for ours, theirs in zip(logits, expected[3:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_layer_never_has_more_than_budget_and_block(monkeypatch):
    """While the prompt is fed, an episode in the making has at most budget + chunk rows."""
    rows = []
    append = EpisodeStorage.append

    def watched(self, keys, values):
        result = append(self, keys, values)
        rows.append(0 if self.keys is None else self.keys.shape[2])
        return result

    monkeypatch.setattr(EpisodeStorage, "append", watched)
    spec = SPEC.format(3)
    with undisturbed(loaded("llama"), load_strategy(spec)):
        session = session_of("llama", spec, 50, 1, 1)
        session.prefill(tokens_of(1, 50))
        assert max(rows) == 12 + 8
        held = [layer.held_bytes for layer in held_by_layer(session.cache)]
    assert held == promised("llama", spec, 50, 0, 1)


def test_a_question_is_answered_from_its_own_episode():
    """Each sequence decodes with the rows of the episode that its first decoded token is nearest
    to, and stays with it.
    """
    model, spec = loaded("llama"), SPEC.format(2)
    table = model.model.get_input_embeddings()
    prompt = torch.tensor([[3] * 20 + [9] * 20, [9] * 20 + [3] * 20])
    with undisturbed(model, load_strategy(spec)):
        session = session_of("llama", spec, 40, 2, 2)
        session.prefill(prompt)
        plan = session.cache.layers[0].plan
        assert plan["active"] == [1, 1]  # of the second topic, in the order of appearance
        session.decode(torch.tensor([[3], [3]]))
        assert plan["active"] == [0, 1]
        chosen = list(plan["active"])
        session.decode(torch.tensor([[9], [9]]))
        assert plan["active"] == chosen
    assert not table._forward_hooks


def test_a_question_that_never_comes_leaves_nothing_behind():
    """A session that ends after its prompt takes its hook along."""
    model, spec = loaded("llama"), SPEC.format(2)
    with undisturbed(model, load_strategy(spec)):
        session_of("llama", spec, 40, 1, 1).prefill(tokens_of(1, 40))
        assert model.model.get_input_embeddings()._forward_hooks
    assert not model.model.get_input_embeddings()._forward_hooks


def test_episodes_need_their_own_prefill():
    """A model that is simply run with the cache is told so."""
    model, spec = loaded("llama"), SPEC.format(2)
    with undisturbed(model, load_strategy(spec)):
        session = session_of("llama", spec, 20, 1, 1)
        with pytest.raises(kvcalc.UnsupportedError, match="prefill"):
            model.model(input_ids=tokens_of(1, 20), past_key_values=session.cache)


def test_windows_are_refused():
    """Layers with a window cannot be fed the same prompt again."""
    with pytest.raises(kvcalc.UnsupportedError, match="repeatedly"):
        promised("gemma3_text", SPEC.format(2), 30, 0, 1)


def test_the_probe_finds_what_is_linear():
    """Its regression gives back the weights that targets were made with, for each head."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 200, 5, generator=generator)
    weights = torch.randn(2, 3, 5, generator=generator)
    targets = (features @ weights[..., None])[..., 0]
    torch.testing.assert_close(ridge(features, targets), weights, atol=0.02, rtol=0.02)


def test_the_probe_says_how_well_it_does():
    """A profile's figures hold its correlation with attention on tokens it was not fitted to."""
    chosen = load_strategy("probe:budget=12,window=4")
    with undisturbed(loaded("llama"), chosen):
        session = session_of("llama", chosen.spec, 200, 2, 1)
        assert session.observed() == {}
        session.prefill(tokens_of(2, 200))
        found = session.observed()
    assert -1 <= found["correlation_least"] <= found["correlation_mean"] <= 1
