"""The running cache of tokens drawn at random."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import (
    Attended,
    PromptEviction,
    RowsKind,
    attending,
    evicting_cache,
)
from kvcalc.strategies._scores import best_and_last

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class RandomStorage(PromptEviction):
    """Each layer draws anew, the same for the same seed."""

    seed: int

    def choose(self, seen: Attended) -> Tensor:
        """Any tokens, and the last."""
        batch, _, rows, _ = seen.key.shape
        generator = torch.Generator().manual_seed(self.seed * self.places + self.place)
        scores = torch.rand(batch, seen.kv_heads, rows - 1, generator=generator)
        return best_and_last(scores, self.budget, 1).to(seen.key.device)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, RandomStorage, parameters, rows=rows)
