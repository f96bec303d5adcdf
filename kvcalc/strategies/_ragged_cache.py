"""Layers whose heads, or whose sequences, keep different numbers of rows, in storage of just these.

Rows stand one after another, first those of head 0 of sequence 0: with lengths 2 and 1 [a a b].
Attention sees them padded to the longest head, one layer at a time, behind a mask.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvcalc.strategies._evicted import check_window
from kvcalc.strategies._evicting_cache import Attended, EvictingStorage, Rows

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Indices = Sequence[Sequence[Tensor]]
"""For each sequence and KV head the rows that stay, any number of them in any order."""

Counts = Sequence[Sequence[int]]
"""For each sequence and KV head how many of the rows before the window stay."""


class RaggedEviction(EvictingStorage):
    """Chooses once, when the prompt is there; later tokens are appended.

    `keys` and `values` are [rows of all heads, width], `lengths` says how many are each head's,
    sequence by sequence; `tail` keeps what is decoded, as many rows for each head.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]
    tail: Rows
    _prompt: tuple[Tensor, Tensor] | None = None

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Nothing is kept before attention was there."""
        self.lengths = [0] * (keys.shape[0] * keys.shape[1])
        self.keys = keys.new_empty(0, keys.shape[3])
        self.values = values.new_empty(0, values.shape[3])
        self.tail = Rows()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt is attended to whole; later tokens with what was kept."""
        if self.num_tokens == keys.shape[2]:
            self._prompt = keys, values
            return keys, values
        keys, values = self.tail.update(keys, values)
        kept_keys, kept_values = self._padded(self.keys), self._padded(self.values)
        return torch.cat([kept_keys, keys], dim=2), torch.cat([kept_values, values], dim=2)

    @property
    def visible(self) -> Tensor | None:
        """All but the padding [batch, KV heads, rows]; None where there is none."""
        longest = max(self.lengths)
        if self._prompt is not None or min(self.lengths) == longest:
            return None
        lengths = torch.tensor(self.lengths, device=self.keys.device)[:, None]
        visible = torch.arange(longest + self.tail.num_tokens, device=self.keys.device)[None]
        return ((visible < lengths) | (visible >= longest)).unflatten(0, (-1, self.kv_heads))

    def _padded(self, rows: Tensor) -> Tensor:
        """[batch, KV heads, most rows of a head, width]."""
        padded = pad_sequence(list(rows.split(self.lengths)), batch_first=True)
        return padded.unflatten(0, (-1, self.kv_heads))

    def attended(self, seen: Attended) -> None:
        """After the prompt: keep what is chosen."""
        if self._prompt is None:
            return
        tokens = seen.key.shape[2]
        if tokens > self.budget:
            name = type(self).__name__
            check_window(name, budget_tokens=self.budget, window=self.window_tokens)
            self.evict(seen)
        else:
            whole = torch.arange(tokens, device=seen.key.device)
            self.keep([[whole] * self.kv_heads] * seen.key.shape[0])
        self._prompt = None

    def evict(self, seen: Attended) -> None:
        """Choose, and call `keep`; of a prompt beyond the budget."""
        raise NotImplementedError

    def keep(self, chosen: Indices) -> None:
        """Take these rows of the prompt over."""
        if self._prompt is None:
            msg = "rows are chosen from a prompt, right after its attention"
            raise RuntimeError(msg)
        self.lengths = [len(head) for sequence in chosen for head in sequence]
        self.keys, self.values = (
            torch.cat(
                [
                    states[batch, head, rows]
                    for batch, sequence in enumerate(chosen)
                    for head, rows in enumerate(sequence)
                ]
            )
            for states in self._prompt
        )
        self.origins = None
        if self.kept is not None:
            self.origins = [rows for sequence in chosen for rows in sequence]
            self.tell(self._prompt[0].shape[2])

    def keep_best(self, scores: Tensor, counts: Counts) -> None:
        """Take the window over, and of the rows before it the best `counts` of each head.

        `scores` are [batch, KV heads, tokens before the window]. The window stands first, then the
        best, so that `trim` leaves the best; of equal scores the earlier is better.
        """
        window = torch.arange(self.window_tokens, device=scores.device) + scores.shape[2]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        self.keep(
            [
                [torch.cat([window, best[:count]]) for best, count in zip(*heads, strict=True)]
                for heads in zip(order, counts, strict=True)
            ]
        )

    def trim_best(self, counts: Counts) -> None:
        """After `keep_best`: keep fewer."""
        self.trim([self.window_tokens + count for heads in counts for count in heads])

    @property
    def head_lengths(self) -> list[list[int]]:
        """`lengths` [batch][KV heads]."""
        starts = range(0, len(self.lengths), self.kv_heads)
        return [self.lengths[start : start + self.kv_heads] for start in starts]

    @property
    def counts(self) -> list[list[int]]:
        """How many rows before the window are there [batch][KV heads]; after `keep_best`."""
        return [[length - self.window_tokens for length in heads] for heads in self.head_lengths]

    origins: "list[Tensor] | None" = None
    """Where the rows of each head stood in the prompt, for `kept`."""

    def tell(self, prompt_tokens: int) -> None:
        """Bring the last of `kept` up to date."""
        if self.kept is None or self.origins is None:
            return
        stays = torch.zeros(len(self.origins), prompt_tokens, dtype=torch.bool)
        for head, rows in zip(stays, self.origins, strict=True):
            head[rows.cpu()] = True
        self.kept[:] = [stays.unflatten(0, (-1, self.kv_heads))]

    def trim(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths` rows of each head, no more than there are."""
        if list(lengths) == self.lengths:
            return
        heads = zip(self.keys.split(self.lengths), self.values.split(self.lengths), strict=True)
        pairs = [
            (keys[:length], values[:length])
            for (keys, values), length in zip(heads, lengths, strict=True)
        ]
        self.keys = torch.cat([keys for keys, _ in pairs])
        self.values = torch.cat([values for _, values in pairs])
        self.lengths = [len(keys) for keys, _ in pairs]
        if self.origins is not None and self.kept:
            self.origins = [
                rows[:length] for rows, length in zip(self.origins, lengths, strict=True)
            ]
            self.tell(self.kept[-1].shape[2])

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self._prompt = self.origins = None
        vars(self).pop("tail", None)


def best_counts(scores: Tensor, best: int) -> list[list[int]]:
    """How many of the `best` largest scores of a sequence each owner has: [batch][owners] of scores
    [batch, owners, any].
    """
    owners = scores.flatten(1).topk(best).indices // scores.shape[2]
    return [sequence.bincount(minlength=scores.shape[1]).tolist() for sequence in owners]


def observed(cache: "Cache") -> dict[str, float]:
    """How unevenly a prompt was kept: tokens of the heads, and of the layers for a head of theirs,
    that kept fewest and most.
    """
    heads: list[int] = []
    layers: list[float] = []
    for layer in cache.layers:
        if isinstance(layer, RaggedEviction) and layer.is_initialized:
            heads += layer.lengths
            layers += [sum(sequence) / len(sequence) for sequence in layer.head_lengths]
    return {
        "fewest_tokens_of_a_head": min(heads, default=0),
        "most_tokens_of_a_head": max(heads, default=0),
        "fewest_tokens_of_a_layer": min(layers, default=0),
        "most_tokens_of_a_layer": max(layers, default=0),
    }
