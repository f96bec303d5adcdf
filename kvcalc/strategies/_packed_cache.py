"""The running cache of int8, int4 and int2: packed groups of tokens and a full-precision tail.

Attention sees what is packed dequantised and everything newer exactly; a group is packed after the
step that moved it out of the tail, so a prefill attends in full precision.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcalc.errors import UnsupportedError
from kvcalc.strategies._packed import packed_range
from kvcalc.strategies._packed_attention import PackedTokens, dequantised, is_active
from kvcalc.strategies._running import Storage, stored

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


class Packed(NamedTuple):
    """Groups of tokens: value ≈ minimum + level × scale, level in 0 to 2^bits - 1.

    `levels` is uint8 [batch, heads, groups, group × bits / 8, width]: with 4 bits, byte row i holds
    token i of its group in the low half and token i + group / 2 in the high one; with 2 bits a
    quarter apart. `scales` and `minima` are in the model's dtype: for keys
    [batch, heads, groups, 1, width, 1], for values [batch, heads, groups, group, width / group, 1].
    """

    levels: Tensor
    scales: Tensor
    minima: Tensor

    @classmethod
    def of(cls, states: Tensor, *, bits: int, group: int, per_channel: bool) -> Self:
        """Quantise states [batch, heads, groups × group, width].

        The minimum of a group is one of its values, so it is exact; levels are taken with the scale
        as it is stored, which is rounded up so that the maximum needs no level above the highest.
        Every value comes back to half a step and the rounding of the dtype.
        """
        width, most = states.shape[-1], 2**bits - 1
        channels = 1 if per_channel else group
        grouped = states.unflatten(3, (width // channels, channels))
        grouped = grouped.unflatten(2, (states.shape[2] // group, group)).float()
        minima, maxima = grouped.aminmax(dim=3 if per_channel else 5, keepdim=True)
        scales = _rounded_up((maxima - minima) / most, states.dtype)
        steps = torch.where(scales == 0, 1, scales).float()
        levels = (grouped - minima).div_(steps).round_().clamp_(0, most)
        packed, *higher = levels.to(torch.uint8).flatten(4).chunk(8 // bits, dim=3)
        for place, part in enumerate(higher, start=1):
            packed = packed | (part << bits * place)
        return cls(packed, scales, minima.to(states.dtype))

    def states(self, bits: int) -> Tensor:
        """The states as they come back, [batch, heads, groups × group, width]."""
        places = range(0, 8, bits)
        levels = torch.cat([self.levels >> place for place in places], dim=3) & (2**bits - 1)
        parts = self.scales.shape[4]
        channels = levels.shape[4] // max(parts, 1)
        grouped = levels.to(self.scales.dtype).unflatten(4, (parts, channels))
        return torch.addcmul(self.minima, grouped, self.scales).flatten(4).flatten(2, 3)

    def followed_by(self, other: Self, *, drop: int) -> Self:
        """Without its first `drop` groups, and with those of `other` after it."""
        joined = [
            torch.cat([own[:, :, drop:], new], dim=2) for own, new in zip(self, other, strict=True)
        ]
        return type(self)(*joined)


def _rounded_up(positive: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers ≥ 0 in `dtype`, none of them smaller: the bits of the next float are one more."""
    rounded = positive.to(dtype)
    bits = rounded.view(torch.int16 if rounded.element_size() == 2 else torch.int32)
    return (bits + (rounded < positive)).view(dtype)


class PackedStorage(Storage):
    """One layer's cache. `keys` and `values` are the tail, [batch, heads, tail, width].

    `packed` says which tokens, counted from 0, stand in `packed_keys` and `packed_values`.
    """

    keys: Tensor
    values: Tensor
    bits: int
    group: int
    residual: int
    packed: range
    packed_keys: Packed
    packed_values: Packed

    def start(self, keys: Tensor, values: Tensor) -> None:
        """An empty tail and no packed group, on the device and in the dtype of the states."""
        self.packed = range(0)
        self.keys, self.values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.packed_keys = self._pack(self.keys, per_channel=True)
        self.packed_values = self._pack(self.values, per_channel=False)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens; attention gets the packed ones dequantised, the others as they came.

        Where the fused attention is active it gets those for a single token as PackedTokens.
        """
        new = keys.shape[2]
        keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        all_keys, all_values = keys, values
        if self.packed:
            fused = new == 1 and self.window is None and is_active()
            joined = PackedTokens if fused else dequantised
            all_keys = joined(self.packed_keys, keys, self.bits)
            all_values = joined(self.packed_values, values, self.bits)
        if self.window is not None:
            visible = min(self.num_tokens, self.window - 1 + new)
            all_keys, all_values = all_keys[:, :, -visible:], all_values[:, :, -visible:]
        self._keep(keys, values)
        return all_keys, all_values

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Pack what has left the tail and let go of what has left the window.

        `keys` and `values` are the old tail and the new tokens.
        """
        old = self.packed
        self.packed = packed_range(
            self.num_tokens, group=self.group, residual=self.residual, window=self.window
        )
        drop = (min(self.packed.start, old.stop) - old.start) // self.group
        fresh = slice(max(self.packed.start, old.stop) - old.stop, self.packed.stop - old.stop)
        if drop or fresh.start < fresh.stop:
            packed = self._pack(keys[:, :, fresh], per_channel=True)
            self.packed_keys = self.packed_keys.followed_by(packed, drop=drop)
            packed = self._pack(values[:, :, fresh], per_channel=False)
            self.packed_values = self.packed_values.followed_by(packed, drop=drop)
        if fresh.stop:
            # Cloned, so that the storage of the tokens before is let go.
            keys, values = keys[:, :, fresh.stop :].clone(), values[:, :, fresh.stop :].clone()
        self.keys, self.values = keys, values

    def _pack(self, states: Tensor, *, per_channel: bool) -> Packed:
        return Packed.of(states, bits=self.bits, group=self.group, per_channel=per_channel)

    def reset(self) -> None:
        """Back to empty; storage is let go at once."""
        super().reset()
        if hasattr(self, "packed"):
            del self.packed, self.packed_keys, self.packed_values


def quantised_cache(
    config: "PreTrainedConfig", storage: type[Storage], **settings: object
) -> "Cache":
    """An empty cache of the model whose layers for the decoder's tokens keep them in a `storage`.

    Raises UnsupportedError for a model that keeps tokens in layers of its own, too.
    """
    cache = stored(config, storage, **settings)
    for layer in cache.layers:
        of_its_own = type(layer).__module__ != DynamicLayer.__module__
        if isinstance(layer, DynamicLayer) and of_its_own and not isinstance(layer, storage):
            model_type = config.get_text_config(decoder=True).model_type
            msg = f"{model_type} keeps tokens in a class of its own, {type(layer).__name__}"
            raise UnsupportedError(msg)
    return cache


def packed_cache(
    config: "PreTrainedConfig", *, bits: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache with `bits` bits a value; `parameters` are group and residual."""
    return quantised_cache(config, PackedStorage, bits=bits, **parameters)
