"""The running DynamicKV cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvcalc.strategies._apportion import apportion
from kvcalc.strategies._evicting_cache import Attended, attending, evicting_cache
from kvcalc.strategies._ragged_cache import RaggedEviction, best_counts, observed
from kvcalc.strategies._scores import pooled, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build", "observed"]


class DynamicKVStorage(RaggedEviction):
    """Scores as SnapKV's. The plan holds, until the last layer is done, the `layers` so far and
    their `scores` [batch, KV heads × tokens before the window].
    """

    kernel: int
    pooling: str
    r_max: int
    every: int

    def evict(self, seen: Attended) -> None:
        """The window and too many of the best; then settle, where it is time."""
        attention = window_attention(seen, self.window_tokens)[..., : -self.window_tokens]
        scores = pooled(attention.sum(2), self.kernel, self.pooling)
        batch, heads, before = scores.shape
        most = min(self.r_max * (self.budget - self.window_tokens), before)
        self.keep_best(scores, [[most] * heads] * batch)
        if self.place == 0:
            self.plan.clear()
        self.plan.setdefault("layers", []).append(self)
        self.plan.setdefault("scores", []).append(scores.flatten(1))
        last = self.place == self.places - 1
        if last or (self.place + 1) % self.every == 0:
            self._settle()
        if last:
            self.plan.clear()

    def _settle(self) -> None:
        """Trim the layers so far to their parts of the whole model's budget."""
        layers = self.plan["layers"]
        budget = self.budget - self.window_tokens
        shares = best_counts(
            torch.stack(self.plan["scores"], dim=1), len(layers) * self.kv_heads * budget
        )
        there = [layer.counts for layer in layers]
        budgets = [
            apportion(share, self.places * budget, [counts[sequence][0] for counts in there])
            for sequence, share in enumerate(shares)
        ]
        for layer, parts in zip(layers, zip(*budgets, strict=True), strict=True):
            layer.trim_best([[part] * self.kv_heads for part in parts])


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, DynamicKVStorage, parameters)
