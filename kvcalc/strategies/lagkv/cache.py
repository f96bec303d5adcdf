"""The running LagKV cache."""

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
from kvcalc.strategies._scores import best, with_ends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


def lag_scores(states: Tensor) -> Tensor:
    """How uneven each token's channels are once the next part's range is taken as 0 to 1.

    `states` are [batch, heads, parts, lag, width]; the scores [batch, heads, parts - 1, lag] of a
    part sum to one, and the last part has none.
    """
    lowest, highest = states[:, :, 1:].aminmax(dim=3, keepdim=True)
    span = highest - lowest
    scaled = (states[:, :, :-1] - lowest) / span.where(span > 0, 1)
    return scaled.std(-1).softmax(-1)


class LagKVStorage(PromptEviction):
    """Keys and values are those that attention sees; of latents, what their expanded heads say is
    averaged.
    """

    sinks: int
    lag: int

    def choose(self, seen: Attended) -> Tensor:
        """The sinks, as many of each part as the budget allows, and the tail."""
        rows = seen.key.shape[2]
        first = min(self.sinks, self.budget - 1)
        lag = min(self.lag, max((self.budget - first) // 3, 1))
        parts = (rows - first) // lag
        scored = parts - 1
        last = rows - first - scored * lag

        middle = slice(first, first + parts * lag)
        keys, values = (
            lag_scores(states[:, :, middle].float().unflatten(2, (parts, lag)))
            for states in (seen.key, seen.value)
        )
        scores = (keys + values).unflatten(1, (seen.kv_heads, -1)).mean(2)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

        # Of a part whose share is n, the ranks below n are above zero; these fill the budget.
        share, over = divmod(self.budget - first - last, scored)
        shares = torch.full((scored, 1), share, device=ranks.device)
        shares[scored - over :] += 1
        chosen = best((shares - ranks).flatten(2), self.budget - first - last)
        return with_ends(chosen + first, first=first, last=last, rows=rows)


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, LagKVStorage, parameters, rows=rows)
