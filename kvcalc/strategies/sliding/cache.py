"""The running windows: the last window - 1 rows, copied out of each step's keys and values."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcalc.errors import UnsupportedError
from kvcalc.strategies._running import Storage, replace_storage
from kvcalc.strategies.sliding import NO_WINDOW

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


class WindowStorage(Storage):
    """`keys` and `values` [batch, KV heads, min(tokens, window - 1), width], in storage that is
    exactly as large.
    """

    keys: Tensor
    values: Tensor

    def start(self, keys: Tensor, values: Tensor) -> None:
        """No rows yet."""
        self.keys, self.values = _last_rows(keys, 0), _last_rows(values, 0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All rows kept and all new ones attend; then those that fell out are let go."""
        all_keys = torch.cat([self.keys, keys], dim=-2)
        all_values = torch.cat([self.values, values], dim=-2)
        rows = min(self.num_tokens, (self.window or 1) - 1)
        self.keys, self.values = _last_rows(all_keys, rows), _last_rows(all_values, rows)
        return all_keys, all_values


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache; layers without a window are transformers' own. It needs no capacity.

    Raises UnsupportedError for a model without any window.
    """
    del capacity_tokens, parameters
    cache = DynamicCache(config=config)
    windows = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if not windows:
        raise UnsupportedError(NO_WINDOW)
    for layer in windows:
        replace_storage(layer, WindowStorage)
    return cache


def _last_rows(states: Tensor, rows: int) -> Tensor:
    """The newest `rows` rows, in storage of their own unless they are all there are."""
    there = states.shape[-2]
    return states if rows == there else states.narrow(-2, there - rows, rows).clone()
