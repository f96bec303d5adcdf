"""The running NACL cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import (
    Attended,
    PromptEviction,
    RowsKind,
    attending,
    evicting_cache,
)
from kvcalc.strategies._scores import best, column_sums, with_ends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class Parts(NamedTuple):
    """How many tokens of a budget are kept for what reason."""

    sinks: int
    best: int
    drawn: int
    recent: int


def parts_of(budget: int, sinks: int) -> Parts:
    """A budget in the paper's proportions, 12 : 7 : 1; one recent token at least.

    Of 26,214 tokens, a fifth of 128k, 256 are sinks, 15,729 best, 9,175 drawn and 1,054 recent.
    The authors' shares are of the prompt's length, each rounded down, and their recent part is
    negative below 25,600 tokens.
    """
    ends = max(budget // 20, 1)
    sinks = min(sinks, ends // 2)
    drawn = (budget - ends) * 7 // 19
    return Parts(sinks, budget - ends - drawn, drawn, ends - sinks)


class NACLStorage(PromptEviction):
    """Each head of each layer draws for itself, the same for the same seed."""

    sinks: int
    seed: int

    def choose(self, seen: Attended) -> Tensor:
        """First tokens, the best, those drawn among the others by the softmax of their scores, and
        the last.

        The largest of scores - ln(exponential noise) are such a draw without replacement (the
        Gumbel trick).
        """
        rows = seen.key.shape[2]
        parts = parts_of(self.budget, self.sinks)
        sums = column_sums(_seeing_all(seen), max(rows // 100, 1))
        scores = sums[..., parts.sinks : rows - parts.recent]
        chosen = best(scores, parts.best)
        generator = torch.Generator().manual_seed(self.seed * self.places + self.place)
        noise = torch.empty(scores.shape).exponential_(generator=generator).log()
        chances = (scores - noise.to(scores.device)).scatter(-1, chosen, -torch.inf)
        middle = torch.cat([chosen, best(chances, parts.drawn)], dim=-1).sort(-1).values
        return with_ends(middle + parts.sinks, first=parts.sinks, last=parts.recent, rows=rows)


def _seeing_all(seen: Attended) -> Attended:
    """Queries see later tokens, too."""
    shape = (1, 1, seen.query.shape[2], seen.key.shape[2])
    return seen._replace(
        mask=torch.ones((), dtype=torch.bool, device=seen.key.device).expand(shape)
    )


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, NACLStorage, parameters, rows=rows)
