"""The running SnapKV cache."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class SnapKVStorage(PromptEviction):
    """The sum of the window's attention, pooled, is the score of a token."""

    kernel: int
    pooling: str

    def choose(self, seen: Attended) -> Tensor:
        """The best before the window, and the window."""
        attention = window_attention(seen, self.window_tokens)[..., : -self.window_tokens]
        scores = pooled(attention.sum(2), self.kernel, self.pooling)
        return best_and_last(scores, self.budget, self.window_tokens)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, SnapKVStorage, parameters, rows=rows)
