"""The running PyramidKV cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcalc.strategies._evicting_cache import (
    Attended,
    PromptEviction,
    RowsKind,
    attending,
    evicting_cache,
)
from kvcalc.strategies._scores import best_and_last, pooled, window_attention
from kvcalc.strategies.pyramidkv import layer_budgets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class PyramidKVStorage(PromptEviction):
    """Scores as SnapKV's; `budget` is that of the average layer."""

    kernel: int
    pooling: str
    beta: int

    def choose(self, seen: Attended) -> Tensor:
        """The best before the window, as many as the place has, and the window."""
        attention = window_attention(seen, self.window_tokens)[..., : -self.window_tokens]
        scores = pooled(attention.sum(2), self.kernel, self.pooling)
        budgets = layer_budgets(
            self.budget,
            window=self.window_tokens,
            beta=self.beta,
            places=self.places,
            prompt_tokens=seen.key.shape[2],
        )
        return best_and_last(scores, budgets[self.place], self.window_tokens)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, PyramidKVStorage, parameters, rows=rows)
