"""The running cache of the last tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import Attended, StepEviction, attending, evicting_cache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class RecencyStorage(StepEviction):
    """Rows stand in the order of their tokens."""

    def choose(self, seen: Attended) -> Tensor:
        """The last."""
        batch, _, rows, _ = seen.key.shape
        last = torch.arange(rows - self.budget, rows, device=seen.key.device)
        return last.expand(batch, seen.kv_heads, self.budget)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, RecencyStorage, parameters)
