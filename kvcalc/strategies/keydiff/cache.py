"""The running KeyDiff cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

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


class KeyDiffStorage(PromptEviction):
    """Keys are those that attention sees; of latents, what their expanded heads say is averaged."""

    def choose(self, seen: Attended) -> Tensor:
        """The keys least like the mean of all directions."""
        keys = seen.key.float()
        anchor = functional.normalize(keys, dim=-1).mean(2, keepdim=True)
        alike = functional.cosine_similarity(keys, anchor, dim=-1)
        return best(-alike.unflatten(1, (seen.kv_heads, -1)).mean(2), self.budget)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, KeyDiffStorage, parameters, rows=rows)
