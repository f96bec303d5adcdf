"""The running EpiCache: `prefill` feeds a prompt block by block, once for each episode."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvcalc.errors import UnsupportedError
from kvcalc.strategies import _evicting_cache
from kvcalc.strategies._evicting_cache import (
    Attended,
    EvictingStorage,
    Rows,
    evicting_cache,
    taken,
)
from kvcalc.strategies._running import feed
from kvcalc.strategies._scores import query_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel

ROUNDS = 10
"""Of k-means; more change nothing in practice."""


class EpisodeStorage(EvictingStorage):
    """One layer. `episodes_kept` holds for each episode keys and values [batch, KV heads, rows,
    width], `tail` what was decoded.

    While a prompt is fed, `keys` and `values` are those of the episode in the making.
    """

    keys: Tensor | None
    values: Tensor | None
    sinks: int
    episodes_kept: list[tuple[Tensor, Tensor]]
    tail: Rows
    _scores: Tensor | None = None

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Nothing yet."""
        del keys, values
        self.episodes_kept, self.tail = [], Rows()
        self.keys = self.values = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A block of the prompt, a typical segment that is only looked at, or a decoded token."""
        stage = self.plan.get("stage")
        if stage is None:
            msg = "epicache needs its own prefill: it feeds the prompt more than once"
            raise UnsupportedError(msg)
        if stage == "decode":
            keys, values = self.tail.update(keys, values)
            own_keys, own_values = self._active()
            return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)
        if self.keys is None or self.values is None:
            # Copied, so that nothing else of what they were computed in stays alive.
            keys, values = keys.clone(), values.clone()
        else:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        if stage == "block":
            self.keys, self.values = keys, values
        else:
            self.num_tokens = self.cumulative_length = self.plan["seen"]
        return keys, values

    def attended(self, seen: Attended) -> None:
        """Note what a typical segment attends to: for each row the most that any of its queries
        gives it.
        """
        if self.plan["stage"] == "look":
            rows = seen.key.shape[2] - seen.query.shape[2]
            attention = query_attention(seen, slice(None))[..., :rows]
            self._scores = attention.amax(2)

    def evict(self) -> None:
        """Keep the sinks, and the best of the other rows up to the budget."""
        if self._scores is None or self.keys is None or self.values is None:
            msg = "rows are chosen after a look at them"
            raise RuntimeError(msg)
        scores, self._scores = self._scores, None
        scores[..., : self.sinks] = torch.inf
        chosen = scores.topk(self.budget, dim=-1).indices.sort(-1).values
        self.record(chosen, self.keys.shape[2])
        self.keys, self.values = taken(self.keys, chosen), taken(self.values, chosen)

    def finish(self) -> None:
        """The episode is complete; the next starts at the first token again."""
        if self.keys is None or self.values is None:
            return
        self.episodes_kept.append((self.keys, self.values))
        self.keys = self.values = None
        self.num_tokens = 0

    def _active(self) -> tuple[Tensor, Tensor]:
        """Keys and values of each sequence's episode."""
        active: list[int] = self.plan["active"]
        keys, values = (
            torch.stack([self.episodes_kept[one][side][row] for row, one in enumerate(active)])
            for side in (0, 1)
        )
        return keys, values

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        for name in ("stage", "active", "seen"):
            self.plan.pop(name, None)
        self.keys = self.values = None
        for name in ("episodes_kept", "tail"):
            vars(self).pop(name, None)


class Episodes(NamedTuple):
    """Clusters of a prompt's segments: `centres` [batch, episodes, hidden] of norm 1, and the
    tokens of a typical segment of each, `medoids` [batch, episodes, segment].
    """

    centres: Tensor
    medoids: Tensor


def find_episodes(embedded: Tensor, tokens: Tensor, *, segment: int, episodes: int) -> Episodes:
    """Cluster whole segments of `tokens` [batch, tokens] by the mean of their `embedded` tokens
    [batch, tokens, hidden], by cosine (spherical k-means from the farthest segments on).

    A prompt shorter than a segment is one; where there are fewer segments than episodes, some
    episodes are the same.
    """
    segment = min(segment, tokens.shape[1])
    whole = tokens.shape[1] // segment * segment
    stretches = tokens[:, :whole].unflatten(1, (-1, segment))
    means = embedded[:, :whole].float().unflatten(1, (-1, segment)).mean(2)
    means = functional.normalize(means - means.mean(1, keepdim=True), dim=-1)
    centres = means[:, :1]
    while centres.shape[1] < episodes:
        nearest = (means @ centres.transpose(1, 2)).amax(2)
        farthest = nearest.argmin(1, keepdim=True)
        centres = torch.cat([centres, _picked(means, farthest)], dim=1)
    for _ in range(ROUNDS):
        nearest = (means @ centres.transpose(1, 2)).argmax(2)
        member = functional.one_hot(nearest, episodes).float()
        sums = member.transpose(1, 2) @ means
        there = member.sum(1)[..., None] > 0
        centres = torch.where(there, functional.normalize(sums, dim=-1), centres)
    typical = (centres @ means.transpose(1, 2)).argmax(2)
    index = typical[..., None].expand(-1, -1, segment)
    return Episodes(centres, stretches.gather(1, index))


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [batch, picked, width] of [batch, rows, width]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def prefill(model: "PreTrainedModel", cache: "Cache", prompt: Tensor) -> Tensor:
    """Feed a prompt [batch, tokens]; returns the logits [batch, vocabulary] after it, of the
    episode that its own last segment is nearest to.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, EpisodeStorage)]
    plan, budget = layers[0].plan, layers[0].budget
    table: Any = model.get_input_embeddings()
    embedded = table(prompt)
    found = find_episodes(embedded, prompt, segment=plan["segment"], episodes=plan["episodes"])
    centre = embedded.float().mean(1)

    def nearest(words: Tensor) -> list[int]:
        """The episode of each sequence that these embedded tokens [batch, tokens, …] are nearest
        to.
        """
        asked = functional.normalize(words.float().mean(1) - centre, dim=-1)
        return (found.centres @ asked[..., None])[..., 0].argmax(1).tolist()

    fits = prompt.shape[1] <= budget
    logits = []
    for episode in range(1 if fits else plan["episodes"]):
        plan["seen"] = 0
        for block in prompt.split(plan["chunk"], dim=1):
            plan["stage"] = "block"
            last = feed(model, cache, block)
            plan["seen"] += block.shape[1]
            _bound(model, cache, layers, found.medoids[:, episode])
        logits.append(last)
        for layer in layers:
            layer.finish()
    for layer in layers:
        layer.num_tokens = layer.cumulative_length = prompt.shape[1]
    plan["stage"] = "decode"
    segment = found.medoids.shape[2]
    plan["active"] = [0] * len(prompt) if fits else nearest(embedded[:, -segment:])
    result = torch.stack([logits[one][row] for row, one in enumerate(plan["active"])])
    if not fits:
        _choose_at_the_next_token(table, plan, nearest)
    return result


def _bound(
    model: "PreTrainedModel", cache: "Cache", layers: list[EpisodeStorage], typical: Tensor
) -> None:
    """Where more rows than the budget are there: look at them with a typical segment, and evict."""
    layer = layers[0]
    if layer.keys is None or layer.keys.shape[2] <= layer.budget:
        return
    layer.plan["stage"] = "look"
    feed(model, cache, typical)
    for layer in layers:
        layer.evict()


def _choose_at_the_next_token(table: Any, plan: dict[str, Any], nearest: Any) -> None:  # noqa: ANN401
    """What is fed next is a question: choose each sequence's episode by its embedding."""

    def choose(module: object, inputs: object, output: Tensor) -> None:
        del module, inputs
        plan["active"] = nearest(output)
        _forget_hooks()

    _hooks.append(table.register_forward_hook(choose))


_hooks: list[Any] = []


def _forget_hooks() -> None:
    while _hooks:
        _hooks.pop().remove()


@contextmanager
def attending(model: "PreTrainedModel") -> Iterator[Counter[str]]:
    """As evicting caches attend; a question that never came is forgotten."""
    _forget_hooks()
    try:
        with _evicting_cache.attending(model) as calls:
            yield calls
    finally:
        _forget_hooks()


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    own = {key: parameters[key] for key in ("budget", "sinks")}
    cache = evicting_cache(config, EpisodeStorage, own)
    for layer in cache.layers:
        if isinstance(layer, EpisodeStorage):
            layer.plan.update({key: parameters[key] for key in ("chunk", "episodes", "segment")})
    return cache
