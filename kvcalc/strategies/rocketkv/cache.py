"""The running RocketKV cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import Attended, Rows, attending, evicting_cache, taken
from kvcalc.strategies.rocketkv import Split
from kvcalc.strategies.snapkv.cache import SnapKVStorage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class RocketKVStorage(SnapKVStorage):
    """SnapKV with the capacity as its budget, and attention that reads part of what is kept.

    `bounds` [batch, KV heads, ceil(rows / chunk), 2 × width] has for each chunk of rows the least
    and then the largest value of each channel of their keys; the last chunk is of the rows that are
    there. With chunks of two and keys of one channel 3, 1, 4 the bounds are [1 3] [4 4], and after
    another key of 1 they are [1 3] [1 4].
    """

    rows: Rows
    token_budget: int
    split: Split
    bounds: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt decides how the budget is split; a decoded row is in the index at once."""
        if self.num_tokens == keys.shape[2]:
            self.split = Split.of(self.token_budget, keys.shape[2])
            self.budget = self.split.capacity
            return super().append(keys, values)
        new = keys.shape[2]
        keys, values = super().append(keys, values)
        self._index(keys, new)
        return keys, values

    def attended(self, seen: Attended) -> None:
        """After the prompt: keep what is chosen, and index it."""
        prompt = self._prompt is not None
        super().attended(seen)
        if prompt:
            keys = self.rows.keys
            self._index(keys, keys.shape[2])

    def _index(self, keys: Tensor, new: int) -> None:
        """Bounds of the chunks that hold any of the last `new` rows, after those of the others."""
        chunk = self.split.chunk
        if chunk == 1:
            return
        whole = (keys.shape[2] - new) // chunk
        fresh = bounds_of(keys[:, :, whole * chunk :], chunk)
        kept = [] if self.bounds is None else [self.bounds[:, :, :whole]]
        self.bounds = torch.cat([*kept, fresh], dim=2)

    def attend(self, module: torch.nn.Module, seen: Attended) -> Tensor:
        """A decode step attends to the tokens that the index points to, and to no other."""
        if seen.query.shape[2] == 1 and seen.key.shape[2] > self.split.tokens:
            chosen = self.look_up(seen)
            seen = seen._replace(key=taken(seen.key, chosen), value=taken(seen.value, chosen))
        return super().attend(module, seen)

    def look_up(self, seen: Attended) -> Tensor:
        """The tokens with the best approximate scores, [batch, KV heads, tokens read], in order.

        Channels are those with the largest |q|, of a bound the one that the sign of q asks for;
        both of q summed over the query heads of a KV head. The score of a token is its share of
        attention, the mean over these heads. Of tokens in one chunk, which have equal scores, the
        first come first.
        """
        rows, width = seen.key.shape[2:]
        query = seen.query[:, :, 0].unflatten(1, (seen.kv_heads, -1))
        channels = query.abs().sum(2).topk(self.split.channels(width), dim=-1).indices
        asked = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1))
        index = seen.key
        if self.bounds is not None:
            index = self.bounds
            channels = channels + width * (asked.sum(2) > 0)
        bound = index.gather(3, channels[:, :, None].expand(-1, -1, index.shape[2], -1))
        logits = (asked @ bound.transpose(2, 3)).float() * seen.scaling
        if self.bounds is not None:
            logits = logits.repeat_interleave(self.split.chunk, dim=3)[..., :rows]
        scores = logits.softmax(-1).mean(2)
        best = scores.sort(dim=-1, descending=True, stable=True).indices
        return best[..., : self.split.tokens].sort(-1).values

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self.bounds = None


def bounds_of(keys: Tensor, chunk: int) -> Tensor:
    """The least and the largest of each channel of keys [batch, heads, rows, width] in chunks of
    rows, the last one of what is left: [batch, heads, chunks, 2 × width].
    """
    missing = -keys.shape[2] % chunk
    filled = torch.cat([keys, keys[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    chunks = filled.unflatten(2, (-1, chunk))
    return torch.cat([chunks.amin(3), chunks.amax(3)], dim=3)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    settings = dict(parameters)
    settings["token_budget"] = settings.pop("budget")
    return evicting_cache(config, RocketKVStorage, settings)
