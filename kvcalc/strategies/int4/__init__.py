"""4-bit keys and values after KIVI (arXiv:2402.02750): keys per channel, values per token.

The most recent tokens stay in the model's dtype. When the tail has grown to `residual` + `group`
tokens, its oldest `group` tokens are quantised together and never touched again: with group 2 and
residual 3, tokens [1 2 3 4] are all tail, the fifth packs [1 2] and leaves [3 4 5].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvcalc.dtypes import COMPUTE_DTYPES, StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import FullAttention, LatentAttention, Layer, PlainLayer, SlidingAttention

SUMMARY = "packed 4-bit keys (per channel) and values (per token) with a full-precision tail"
SOURCE = "KIVI, arXiv:2402.02750, section 3"
WORKS_ON = "full-attention and latent layers; window layers stay in the model's dtype"
PARAMETERS: Mapping[str, int] = {"group": 32, "residual": 128}

BITS = 4


def packed_tokens(tokens: int, *, group: int, residual: int) -> int:
    """How many of `tokens` tokens are packed; it depends on nothing but the count."""
    return max(tokens - residual, 0) // group * group


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer(PlainLayer):
    """Rows packed to 4 bits in groups, each with a scale and a minimum in the model's dtype.

    A key group is `group` tokens of one channel, a value group `group` channels of one token.
    """

    kind: ClassVar[str] = "packed_int4"
    layer: FullAttention | LatentAttention
    group: int
    residual: int

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Packed values, their scales and minima, and the tail in `dtype`."""
        if dtype.name not in COMPUTE_DTYPES:
            msg = f"int4 keeps its tail and scales in {', '.join(COMPUTE_DTYPES)}, not {dtype.name}"
            raise UnsupportedError(msg)
        packed = packed_tokens(tokens, group=self.group, residual=self.residual)
        heads, key_dim, value_dim = self.layer.rows()
        payload = heads * (key_dim + value_dim) * packed * BITS // 8
        key_groups = heads * key_dim * (packed // self.group)
        value_groups = heads * packed * (value_dim // self.group)
        scales = dtype.row_bytes(2 * (key_groups + value_groups))
        tail = (tokens - packed) * self.layer.row_bytes(dtype)
        return batch * (payload + scales + tail)

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase: each group that is packed frees most of what its tokens held."""
        return None

    def shard(self, tp: int) -> Self:
        """Heads are packed on their own, so each rank packs its part."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """Widths, group and tail."""
        return f"{self.layer.keeps()}, int4/{self.group} + tail ≥ {self.residual}"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Payload, groups and tail."""
        packed = packed_tokens(tokens, group=self.group, residual=self.residual)
        width = dtype.block_bytes
        return (
            f"{self.layer.keeps()} × [{packed:,} packed tokens × (1/2 + 2×{width}/{self.group}) B "
            f"+ {tokens - packed:,} tail tokens × {width} B]"
        )


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """Pack full and latent layers; a window layer stays as it is.

    Raises InputError for a group below 2 and UnsupportedError when the rows of a layer do not
    divide into groups.
    """
    group, residual = parameters["group"], parameters["residual"]
    if group < 2:
        msg = f"int4: group must be at least 2, not {group}"
        raise InputError(msg)
    if isinstance(layer, SlidingAttention):
        return layer
    if not isinstance(layer, FullAttention | LatentAttention):
        msg = f"int4 does not cover layers of kind {layer.kind}"
        raise UnsupportedError(msg)
    _, key_dim, value_dim = layer.rows()
    if value_dim % group or key_dim % 2 or value_dim % 2:
        msg = (
            f"int4: rows of {key_dim} K and {value_dim} V do not divide into pairs and groups of "
            f"{group}; choose a group that divides {value_dim}"
        )
        raise UnsupportedError(msg)
    return PackedLayer(layer=layer, group=group, residual=residual)
