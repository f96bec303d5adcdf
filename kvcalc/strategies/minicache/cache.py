"""The running MiniCache: rows of a prompt restored from what two layers have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import (
    Attended,
    EvictingStorage,
    Rows,
    attending,
    evicting_cache,
    taken,
)
from kvcalc.strategies.minicache import Role, unmerged_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]


class Merged(NamedTuple):
    """A layer's keys, or its values, of a prompt.

    `directions` [batch, KV heads, tokens, width] and `places` (int32) [batch, KV heads, unmerged]
    are also those of the other layer of the pair; `norms` [batch, KV heads, tokens, 1] and `rows`
    [batch, KV heads, unmerged, width], which stand at `places`, are its own.
    """

    directions: Tensor
    places: Tensor
    norms: Tensor
    rows: Tensor

    def states(self) -> Tensor:
        """As attention sees them, [batch, KV heads, tokens, width]."""
        restored = self.directions * self.norms
        index = self.places.long()[..., None].expand_as(self.rows)
        return restored.scatter_(2, index, self.rows)


def merge(lower: Tensor, upper: Tensor, *, t: float, gamma: float) -> tuple[Merged, Merged]:
    """Rows [batch, KV heads, tokens, width] of a layer and of the one above it.

    Head by head, as float32 copies of all would be more than a prompt's layer.
    """
    heads = [
        _joined(low, high, t) for low, high in zip(lower.unbind(1), upper.unbind(1), strict=True)
    ]
    angles, directions, low_norms, high_norms = (
        torch.stack(parts, dim=1) for parts in zip(*heads, strict=True)
    )
    unmerged = unmerged_tokens(lower.shape[2], gamma)
    places = angles.topk(unmerged, dim=-1).indices.sort(-1).values
    shared = directions, places.int()
    return (
        Merged(*shared, low_norms, taken(lower, places)),
        Merged(*shared, high_norms, taken(upper, places)),
    )


def _joined(lower: Tensor, upper: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows [batch, tokens, width]: the angles between them [batch, tokens], the directions on
    the great circle between theirs (SLERP), and both norms, in the dtype of the rows.

    Computed in float32; a row of zeros has the direction of the other layer's.
    """
    low_norm, high_norm = (rows.float().norm(dim=-1, keepdim=True) for rows in (lower, upper))
    low = lower.float() / low_norm.where(low_norm > 0, 1)
    high = upper.float() / high_norm.where(high_norm > 0, 1)
    low, high = low.where(low_norm > 0, high), high.where(high_norm > 0, low)
    # acos of the cosine would be coarse where rows are alike, which is where most are.
    angles = 2 * torch.atan2((low - high).norm(dim=-1), (low + high).norm(dim=-1))
    directions = _slerp(angles[..., None], 1 - t) * low + _slerp(angles[..., None], t) * high
    dtype = lower.dtype
    return angles, directions.to(dtype), low_norm.to(dtype), high_norm.to(dtype)


def _slerp(angles: Tensor, share: float) -> Tensor:
    """sin(share × angle) / sin(angle), which is the share itself where they are too small."""
    sines = angles.sin()
    flat = sines.abs() < 1e-6
    return ((share * angles).sin() / sines.where(~flat, 1)).where(~flat, share)


class MiniCacheStorage(EvictingStorage):
    """One layer: its prompt merged with its partner's, and `tail` with what is decoded.

    A layer that has no partner, or is waiting for it, has its prompt in the tail, too. The lower
    layer of a pair waits in the `plan`.
    """

    role: Role
    t: float
    gamma: float
    tail: Rows
    merged: tuple[Merged, Merged] | None = None
    _prompt: tuple[Tensor, Tensor] | None = None

    def start(self, keys: Tensor, values: Tensor) -> None:
        """No rows yet."""
        del keys, values
        self.tail = Rows()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt is attended to as it is; later tokens with what is restored of it."""
        if self.num_tokens == keys.shape[2]:
            self._prompt = keys, values
            return keys, values
        keys, values = self.tail.update(keys, values)
        if self.merged is None:
            return keys, values
        merged_keys, merged_values = self.merged
        return (
            torch.cat([merged_keys.states(), keys], dim=2),
            torch.cat([merged_values.states(), values], dim=2),
        )

    def attended(self, seen: Attended) -> None:
        """After the prompt: wait for the partner, or merge with it."""
        del seen
        if self._prompt is None:
            return
        prompt, self._prompt = self._prompt, None
        if self.role is Role.UPPER:
            lower: MiniCacheStorage = self.plan.pop(Role.LOWER.value)
            pairs = [
                merge(low, high, t=self.t, gamma=self.gamma)
                for low, high in zip((lower.tail.keys, lower.tail.values), prompt, strict=True)
            ]
            lower.merged = pairs[0][0], pairs[1][0]
            self.merged = pairs[0][1], pairs[1][1]
            lower.tail = Rows()
            return
        self.tail.update(*prompt)
        if self.role is Role.LOWER:
            self.plan[self.role.value] = self

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self.merged = self._prompt = None
        self.plan.clear()
        vars(self).pop("tail", None)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    settings = dict(parameters)
    start = settings.pop("start")
    cache = evicting_cache(config, MiniCacheStorage, settings)
    for layer in cache.layers:
        if isinstance(layer, MiniCacheStorage):
            layer.role = Role.of(layer.place, layer.places, start)
    return cache
