"""The running LAVa cache."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcalc.strategies._apportion import apportion, head_budgets
from kvcalc.strategies._evicting_cache import Attended, attending, evicting_cache
from kvcalc.strategies._ragged_cache import RaggedEviction, observed
from kvcalc.strategies._scores import head_attention, pooled

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build", "observed"]


SMALLEST = 1e-30
"""What the scores of a layer sum up to at least, so that they can be divided by it."""


class Ranked(NamedTuple):
    """What is known of a layer until the last one is done.

    `owners` [batch, KV heads × tokens before the window] says whose each score is, best first;
    `entropies` are those of its scores, 1 if all are equal, for each sequence.
    """

    layer: "LavaStorage"
    owners: Tensor
    entropies: list[float]


class LavaStorage(RaggedEviction):
    """The plan holds the layers so far, as `ranked`."""

    kernel: int
    pooling: str
    alpha: float

    def evict(self, seen: Attended) -> None:
        """Spread the budget over the layers so far, and trim them to it."""
        scores = self._scores(seen)
        if self.place == 0:
            self.plan.clear()
        ranked: list[Ranked] = self.plan.setdefault("ranked", [])
        flat = scores.flatten(1)
        owners = flat.argsort(dim=-1, descending=True, stable=True) // scores.shape[2]
        ranked.append(Ranked(self, owners.short(), _entropies(flat)))
        there = [one.layer.counts for one in ranked[:-1]]
        there.append([[scores.shape[2]] * self.kv_heads] * scores.shape[0])
        total = self.places * (self.budget - self.window_tokens)
        budgets = [
            apportion(
                [one.entropies[sequence] for one in ranked],
                total,
                [sum(counts[sequence]) // self.kv_heads for counts in there],
            )
            for sequence in range(scores.shape[0])
        ]
        for one, counts, parts in zip(ranked, there, zip(*budgets, strict=True), strict=True):
            heads = [
                self._heads(owners, part, caps)
                for owners, part, caps in zip(one.owners, parts, counts, strict=True)
            ]
            if one.layer is self:
                self.keep_best(scores, heads)
            else:
                one.layer.trim_best(heads)
        if self.place == self.places - 1:
            self.plan.clear()

    def _scores(self, seen: Attended) -> Tensor:
        """For each KV head and token before the window [batch, KV heads, tokens before it].

        The mean of the window's attention, pooled, times the largest L1 norm of a value of the
        head; of the query heads of a KV head the largest.
        """
        window = self.window_tokens
        attention = head_attention(seen, slice(seen.query.shape[2] - window, None))
        scores = pooled(attention[..., :-window].mean(2), self.kernel, self.pooling)
        values = seen.value[:, :, :-window]
        norms = torch.linalg.vector_norm(values, 1, dim=3, dtype=torch.float32).amax(2)
        norms = norms.repeat_interleave(scores.shape[1] // norms.shape[1], dim=1)
        return (scores * norms[..., None]).unflatten(1, (self.kv_heads, -1)).amax(2)

    def _heads(self, owners: Tensor, budget: int, caps: list[int]) -> list[int]:
        """How a layer of one sequence shares `budget` tokens for the average head."""
        hits = owners[: budget * self.kv_heads].int().bincount(minlength=self.kv_heads)
        return head_budgets(hits.tolist(), budget, self.alpha, caps)


def _entropies(scores: Tensor) -> list[float]:
    """Of scores [batch, any], as parts of that of equal ones."""
    parts = scores / scores.sum(-1, keepdim=True).clamp_min(SMALLEST)
    of_equal = math.log(scores.shape[1])
    entropies: list[float] = (torch.special.entr(parts).sum(-1) / of_equal).tolist()
    return entropies


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, LavaStorage, parameters)
