"""The running cache of the shortest keys."""

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
from kvcalc.strategies._scores import best

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class KnormStorage(PromptEviction):
    """Norms are those of the keys that attention sees; of latents, those of their expanded heads
    are averaged.
    """

    def choose(self, seen: Attended) -> Tensor:
        """The shortest keys."""
        norms = seen.key.float().norm(dim=-1)
        return best(-norms.unflatten(1, (seen.kv_heads, -1)).mean(2), self.budget)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, KnormStorage, parameters, rows=rows)
