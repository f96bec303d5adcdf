"""A cache allocated once for the whole sequence, written in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import UnsupportedError
from kvcalc.layers import FullAttention, LatentAttention, Layer, PlainLayer, SlidingAttention

SUMMARY = "allocated once at full length and written in place (prompt + generated tokens)"
SOURCE = "transformers StaticCache"
WORKS_ON = "full-attention, window and latent layers"
PARAMETERS: Mapping[str, int] = {}

COUNTER_BYTES = 8
"""The int64 position at which a layer writes next, kept on the device beside K and V."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreallocatedLayer(PlainLayer):
    """A layer's storage for a whole sequence, allocated before its tokens arrive.

    For `tokens` tokens it is the storage of a cache whose capacity is exactly `tokens`.
    """

    kind: ClassVar[str] = "preallocated"
    layer: Layer

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """The inner layer when full, and one counter for all sequences."""
        return self.layer.num_bytes(tokens=tokens, batch=batch, dtype=dtype) + COUNTER_BYTES

    def breakpoints(self) -> tuple[int, ...] | None:
        """Those of the inner layer, in capacity instead of tokens."""
        return self.layer.breakpoints()

    def shard(self, tp: int) -> Self:
        """Each rank preallocates its part."""
        return type(self)(layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """As the inner layer."""
        return self.layer.keeps()

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The inner layer plus the counter."""
        return f"{self.layer.formula(tokens=tokens, dtype=dtype)} + {COUNTER_BYTES} B counter"


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The same rows, all of them allocated at once."""
    del parameters
    if not isinstance(layer, FullAttention | SlidingAttention | LatentAttention):
        msg = f"static does not cover layers of kind {layer.kind}"
        raise UnsupportedError(msg)
    return PreallocatedLayer(layer=layer)
