"""The running H2O cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from kvcalc.strategies._evicting_cache import Attended, StepEviction, attending, evicting_cache
from kvcalc.strategies._scores import best_and_last, column_sums

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class H2OStorage(StepEviction):
    """`sums` [batch, KV heads, rows] is the attention that each row got so far, in float32."""

    recent_share: float
    sums: Tensor
    beside = ("sums",)

    def observe(self, seen: Attended) -> None:
        """Add what the new queries attended to; new rows start at nothing."""
        fresh = column_sums(seen)
        new = seen.query.shape[2]
        if self.num_tokens > new:
            fresh += functional.pad(self.sums, (0, new))
        self.sums = fresh

    def choose(self, seen: Attended) -> Tensor:
        """The heaviest before the recent ones, and these; at least one is recent."""
        del seen
        recent = max(int(self.budget * self.recent_share), 1)
        return best_and_last(self.sums[..., :-recent], self.budget, recent)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, H2OStorage, parameters)
