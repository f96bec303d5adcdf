"""The running Ada-KV cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvcalc.strategies._apportion import head_budgets
from kvcalc.strategies._evicting_cache import Attended, attending, evicting_cache
from kvcalc.strategies._ragged_cache import RaggedEviction, best_counts, observed
from kvcalc.strategies._scores import pooled, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build", "observed"]


class AdaKVStorage(RaggedEviction):
    """The mean of the window's attention, pooled, is the score of a token in a head."""

    kernel: int
    pooling: str
    alpha: float

    def evict(self, seen: Attended) -> None:
        """The window, and the best of each head, as many as it has among the layer's best."""
        attention = window_attention(seen, self.window_tokens)[..., : -self.window_tokens]
        scores = pooled(attention.mean(2), self.kernel, self.pooling)
        _, heads, before = scores.shape
        budget = self.budget - self.window_tokens
        self.keep_best(
            scores,
            [
                head_budgets(hits, budget, self.alpha, [before] * heads)
                for hits in best_counts(scores, heads * budget)
            ],
        )


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, AdaKVStorage, parameters)
