"""The running int4 cache: packed storage and a full-precision tail, in place of DynamicLayer.

Attention sees what is packed dequantised and everything newer exactly; a group is packed after the
step that moved it out of the tail, so a prefill attends in full precision.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcalc.errors import UnsupportedError
from kvcalc.strategies.int4 import BITS, packed_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

_LEVELS = 2**BITS - 1


class Int4Layer(DynamicLayer):
    """One layer's cache. `keys` and `values` are the tail, [batch, heads, tail, dim].

    Packed: two values a byte along the channels, `packed_keys` and `packed_values`
    [batch, heads, packed, dim / 2]. Keys have a scale and a minimum for each channel and group of
    tokens, [batch, heads, packed / group, dim]; values for each token and group of channels,
    [batch, heads, packed, dim / group].
    """

    is_croppable = False

    def __init__(self, *, group: int, residual: int) -> None:
        super().__init__()
        self.group = group
        self.residual = residual
        self.num_tokens = 0
        self.keys: Tensor
        self.values: Tensor
        self.packed_keys = self.key_scales = self.key_minima = torch.empty(0)
        self.packed_values = self.value_scales = self.value_minima = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty tail and empty packed storage, on the device and in the dtype of the states."""
        batch, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        if value_dim % self.group or key_dim % 2 or value_dim % 2:
            msg = f"rows of {key_dim} K and {value_dim} V do not divide into groups of {self.group}"
            raise UnsupportedError(msg)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, 0, key_dim)
        self.values = value_states.new_empty(batch, heads, 0, value_dim)
        self.packed_keys = self.keys.new_empty(batch, heads, 0, key_dim // 2, dtype=torch.uint8)
        self.key_scales = self.keys.new_empty(batch, heads, 0, key_dim)
        self.key_minima = self.keys.new_empty(batch, heads, 0, key_dim)
        self.packed_values = self.keys.new_empty(batch, heads, 0, value_dim // 2, dtype=torch.uint8)
        self.value_scales = self.keys.new_empty(batch, heads, 0, value_dim // self.group)
        self.value_minima = self.keys.new_empty(batch, heads, 0, value_dim // self.group)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - transformers' signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values for this step's attention."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        all_keys, all_values = keys, values
        if self.packed_keys.shape[-2]:
            all_keys = torch.cat([self.unpacked_keys(), keys], dim=-2)
            all_values = torch.cat([self.unpacked_values(), values], dim=-2)
        packed = packed_tokens(self.num_tokens, group=self.group, residual=self.residual)
        fresh = packed - self.packed_keys.shape[-2]
        if fresh:
            self._pack(keys[:, :, :fresh], values[:, :, :fresh])
            # Cloned, so that the packed tokens' storage is let go.
            keys, values = keys[:, :, fresh:].clone(), values[:, :, fresh:].clone()
        self.keys, self.values = keys, values
        return all_keys, all_values

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions are counted from."""
        return self.num_tokens

    def unpacked_keys(self) -> Tensor:
        """The packed keys, [batch, heads, packed, key_dim]."""
        grouped = _unpack(self.packed_keys, self.dtype).unflatten(2, (-1, self.group))
        scales, minima = self.key_scales.unsqueeze(3), self.key_minima.unsqueeze(3)
        return torch.addcmul(minima, grouped, scales).flatten(2, 3)

    def unpacked_values(self) -> Tensor:
        """The packed values, [batch, heads, packed, value_dim]."""
        grouped = _unpack(self.packed_values, self.dtype).unflatten(3, (-1, self.group))
        scales, minima = self.value_scales.unsqueeze(4), self.value_minima.unsqueeze(4)
        return torch.addcmul(minima, grouped, scales).flatten(3, 4)

    def reset(self) -> None:
        """Back to empty; storage is let go."""
        self.__init__(group=self.group, residual=self.residual)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: packed tokens cannot return to the tail they came from."""
        self._refuse("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not written: beam search."""
        self._refuse("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not written: beam search and sampling of several answers."""
        self._refuse("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not written: contrastive search."""
        self._refuse("batch_select_indices", indices)

    def _refuse(self, what: str, argument: object) -> None:
        del argument
        msg = f"the int4 cache cannot {what}"
        raise UnsupportedError(msg)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        """Append whole groups of tokens to the packed storage; what is there is only copied."""
        payload, scales, minima = _quantize(keys.unflatten(2, (-1, self.group)), dim=3)
        self.packed_keys = torch.cat([self.packed_keys, _pack(payload.flatten(2, 3))], dim=2)
        self.key_scales = torch.cat([self.key_scales, scales.squeeze(3)], dim=2)
        self.key_minima = torch.cat([self.key_minima, minima.squeeze(3)], dim=2)
        payload, scales, minima = _quantize(values.unflatten(3, (-1, self.group)), dim=4)
        self.packed_values = torch.cat([self.packed_values, _pack(payload.flatten(3, 4))], dim=2)
        self.value_scales = torch.cat([self.value_scales, scales.squeeze(4)], dim=2)
        self.value_minima = torch.cat([self.value_minima, minima.squeeze(4)], dim=2)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache: packed where a layer keeps every token, transformers' own for windows."""
    del capacity_tokens
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = Int4Layer(**parameters)
        elif type(layer) is not DynamicSlidingWindowLayer:
            msg = f"int4 does not cover layers of kind {type(layer).__name__}"
            raise UnsupportedError(msg)
    return cache


def _quantize(values: Tensor, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 4-bit levels along `dim`: values ≈ minimum + level × scale.

    The minimum is one of the values, so it is exact in their dtype; levels are taken with the
    scale as it will be stored. Returns uint8 levels, scales and minima with `dim` of size 1.
    """
    minima, maxima = values.aminmax(dim=dim, keepdim=True)
    scales = ((maxima.float() - minima.float()) / _LEVELS).to(values.dtype)
    steps = torch.where(scales == 0, 1, scales).float()
    levels = ((values.float() - minima.float()) / steps).round_().clamp_(0, _LEVELS)
    return levels.to(torch.uint8), scales, minima


def _pack(levels: Tensor) -> Tensor:
    """Two levels a byte: channel 2i in the low half, 2i + 1 in the high one."""
    return levels[..., 0::2] | (levels[..., 1::2] << BITS)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels in `dtype`, in the order of `_pack`."""
    return torch.stack([packed & _LEVELS, packed >> BITS], dim=-1).flatten(-2).to(dtype)
