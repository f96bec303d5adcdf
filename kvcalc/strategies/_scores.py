"""Scores by which rows are kept, [batch, KV heads, rows], in float32: of queries, what the query
heads of a KV head say is averaged.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kvcalc.strategies._evicting_cache import Attended

BLOCK_TOKENS = 256
"""Queries whose attention is computed at a time where all are needed."""


def query_attention(seen: Attended, queries: slice) -> Tensor:
    """Attention of some of the new tokens to all rows, [batch, KV heads, queries, rows]."""
    return head_attention(seen, queries).unflatten(1, (seen.kv_heads, -1)).mean(2)


def head_attention(seen: Attended, queries: slice) -> Tensor:
    """The same of each query head for itself, [batch, query heads, queries, rows].

    The softmax is over what each query sees, in float32.
    """
    batch, heads, new, width = seen.query.shape
    rows = seen.key.shape[2]
    first, last, _ = queries.indices(new)
    asked = seen.query[:, :, first:last].reshape(batch, seen.key.shape[1], -1, width)
    # Where rows stand in order, those after the last query are not looked at.
    keys = seen.key if seen.mask is not None else seen.key[:, :, : rows - new + last]
    logits = (asked @ keys.transpose(2, 3)).view(batch, heads, last - first, -1)
    logits = logits.float() * seen.scaling
    if seen.mask is None:
        see = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device)
        hidden = ~see.tril(logits.shape[3] - logits.shape[2])
    else:
        hidden = ~seen.mask[:, :, first:last]
        if hidden.shape[1] > 1:
            hidden = hidden.repeat_interleave(heads // hidden.shape[1], dim=1)
    attention = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
    return functional.pad(attention, (0, rows - logits.shape[3]))


def window_attention(seen: Attended, window: int) -> Tensor:
    """Attention of the last `window` queries, [batch, KV heads, window, rows]."""
    return query_attention(seen, slice(max(seen.query.shape[2] - window, 0), None))


def column_sums(seen: Attended, queries: int | None = None) -> Tensor:
    """What each row got of all new queries together, or of the last `queries`, [batch, KV heads,
    rows]; a block of queries at a time.
    """
    new = seen.query.shape[2]
    blocks = _blocks(0 if queries is None else max(new - queries, 0), new)
    total = query_attention(seen, next(blocks)).sum(2)
    for block in blocks:
        total += query_attention(seen, block).sum(2)
    return total


def _blocks(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, BLOCK_TOKENS):
        yield slice(start, min(start + BLOCK_TOKENS, last))


def pooled(scores: Tensor, kernel: int, pooling: str) -> Tensor:
    """Each score with its neighbours: the largest (`max`) or the mean (`avg`) of `kernel`, an odd
    number.
    """
    pool = functional.max_pool1d if pooling == "max" else functional.avg_pool1d
    return pool(scores, kernel, stride=1, padding=kernel // 2)


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` best scores stand in [batch, heads, rows], in order."""
    return scores.topk(count, dim=-1).indices.sort(-1).values


def best_and_last(scores: Tensor, budget: int, window: int) -> Tensor:
    """The tokens with the best scores [batch, KV heads, tokens before the window] and the `window`
    tokens after them, `budget` in all: [batch, KV heads, budget], in order.
    """
    before = scores.shape[-1]
    return with_ends(best(scores, budget - window), first=0, last=window, rows=before + window)


def with_ends(middle: Tensor, *, first: int, last: int, rows: int) -> Tensor:
    """Rows [batch, heads, number of them] with the `first` rows before and the `last` of `rows`
    after them.
    """
    ends = torch.arange(rows, device=middle.device).expand(*middle.shape[:2], rows)
    return torch.cat([ends[..., :first], middle, ends[..., rows - last :]], dim=2)
