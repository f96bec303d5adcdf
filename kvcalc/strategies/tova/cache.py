"""The running TOVA cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcalc.strategies._evicting_cache import Attended, StepEviction, attending, evicting_cache
from kvcalc.strategies._scores import best_and_last, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class TOVAStorage(StepEviction):
    """One choice for the whole layer. The authors' code lets the newest token compete, too; here it
    always stays.
    """

    def choose(self, seen: Attended) -> Tensor:
        """The best before the newest, and the newest."""
        attention = window_attention(seen, 1)[:, :, 0, :-1].mean(1, keepdim=True)
        return best_and_last(attention, self.budget, 1).expand(-1, seen.kv_heads, -1)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, TOVAStorage, parameters)
