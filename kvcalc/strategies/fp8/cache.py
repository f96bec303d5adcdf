"""The running fp8 cache: e4m3 rows and their scales.

Attention sees earlier tokens dequantised and the new ones of its step exactly.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcalc.strategies._packed_cache import quantised_cache
from kvcalc.strategies._running import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max


class Fp8Storage(Storage):
    """One layer's cache: all tokens, or the last window - 1.

    `keys` and `values` are float8_e4m3fn [batch, heads, tokens, width], `key_scales` and
    `value_scales` float32 [batch, heads, tokens, 1]; a row without width has no scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Nothing yet."""
        self.keys, self.key_scales = _quantised(keys[:, :, :0])
        self.values, self.value_scales = _quantised(values[:, :, :0])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens; attention gets the earlier ones dequantised."""
        old_keys = (self.keys.float() * self.key_scales).to(keys.dtype)
        old_values = (self.values.float() * self.value_scales).to(values.dtype)
        new_keys, new_key_scales = _quantised(keys)
        new_values, new_value_scales = _quantised(values)
        self.keys = self._joined(self.keys, new_keys)
        self.key_scales = self._joined(self.key_scales, new_key_scales)
        self.values = self._joined(self.values, new_values)
        self.value_scales = self._joined(self.value_scales, new_value_scales)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([old, new], dim=2)
        if self.window is None or joined.shape[2] < self.window:
            return joined
        # Cloned, so that the storage of the tokens before is let go.
        return joined[:, :, 1 - self.window :].clone()

    def reset(self) -> None:
        """Back to empty; storage is let go at once."""
        super().reset()
        if hasattr(self, "key_scales"):
            del self.key_scales, self.value_scales


def _quantised(states: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and scales of states [batch, heads, tokens, width]."""
    exact = states.float()
    if not states.shape[-1]:
        return exact.to(_FORMAT), exact
    scales = exact.abs().amax(dim=-1, keepdim=True) / _LARGEST
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
    return (exact / scales).clamp_(-_LARGEST, _LARGEST).to(_FORMAT), scales


def storage(
    config: "PreTrainedConfig", parameters: Mapping[str, int]
) -> tuple[type[Storage], dict[str, object]]:
    """What keeps the rows of a layer; it has no attributes."""
    del config, parameters
    return Fp8Storage, {}


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens, parameters
    return quantised_cache(config, Fp8Storage)
