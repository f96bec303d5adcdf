"""The running TreeKV cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kvcalc.strategies._evicting_cache import Attended, StepEviction, attending, evicting_cache
from kvcalc.strategies._scores import column_sums, with_ends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]

QUERIES = 32
"""The last of a prompt that are asked, as SnapKV asks them; the paper asks its last block."""


class TreeKVStorage(StepEviction):
    """`sums` [batch, KV heads, rows] is the attention that each row got, `counts` of how many
    queries. `cursor` is which pair of the tree is next, the same for all heads.
    """

    sinks: int
    sums: Tensor
    counts: Tensor
    cursor = 0
    beside = ("sums", "counts")

    def observe(self, seen: Attended) -> None:
        """Add what the new queries attended to; a new row is seen by itself and those after it."""
        new, rows = seen.query.shape[2], seen.key.shape[2]
        asked = min(new, QUERIES)
        ages = torch.arange(rows, 0, -1, dtype=torch.int32, device=seen.key.device)
        sums = column_sums(seen, asked)
        counts = ages.clamp(max=asked).repeat(*sums.shape[:2], 1)
        if self.num_tokens > new:
            sums += functional.pad(self.sums, (0, new))
            counts += functional.pad(self.counts, (0, new))
        self.sums, self.counts = sums, counts

    def choose(self, seen: Attended) -> Tensor:
        """First tokens, the tree, and the last, of which there is one at least."""
        rows = seen.key.shape[2]
        tree = self.budget // 2
        sinks = min(self.sinks, self.budget - tree - 1)
        recent = self.budget - tree - sinks
        average = (self.sums / self.counts)[..., sinks : rows - recent]
        middle, self.cursor = thinned(average, tree, self.cursor)
        return with_ends(middle + sinks, first=sinks, last=recent, rows=rows)

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self.cursor = 0


def thinned(scores: Tensor, capacity: int, cursor: int) -> tuple[Tensor, int]:
    """Which of the scored tokens [batch, heads, tokens] a tree keeps, [batch, heads, capacity] in
    order, and where it goes on; `cursor` counts from 0.

    As if they came one by one. A round over the tree is one over disjoint pairs: with capacity 4
    and scores [3 1 5 2 4 9 6 8], (3 1) goes to [3 5 2 4], then (5 2) of [3 5 2 4 9] to [3 5 4 9],
    (4 9) of [3 5 4 9 6] to [3 5 9 6], and (6 8) of [3 5 9 6 8] to [3 5 9 8]. Of equals the older
    goes. The paper's algorithm adds 2 to the cursor; its text and figure 3 add 1, as we do.
    """
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if not capacity:
        return places[..., :0], 0
    while (over := places.shape[-1] - capacity) > 0:
        pairs = min(capacity - cursor, over)
        before, scope, after = places.tensor_split([cursor, cursor + 2 * pairs], dim=-1)
        weights = scores.gather(-1, scope)
        older, newer = scope[..., ::2], scope[..., 1::2]
        winners = torch.where(weights[..., ::2] > weights[..., 1::2], older, newer)
        places = torch.cat([before, winners, after], dim=-1)
        cursor = (cursor + pairs) % capacity
    return places, cursor


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, TreeKVStorage, parameters)
