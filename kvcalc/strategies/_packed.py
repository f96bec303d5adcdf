"""Packed integer keys and values after KIVI (arXiv:2402.02750, section 3): what int8, int4 and int2
promise.

Keys are quantised per channel over `group` tokens, values per token over `group` channels. The most
recent tokens stay in the model's dtype; when this tail has grown to `residual` + `group` tokens its
oldest `group` tokens are quantised together and never touched again. With group 2, residual 1:

    token 2   1 2
    token 3   [1 2] 3
    token 4   [1 2] 3 4
    token 5   [1 2] [3 4] 5

A layer with a window attends to the last window - 1 tokens before the new one. A packed group is
let go when its last token has left the window; with a window of 6 besides:

    token 7   [3 4] [5 6] 7         [1 2] was let go: the next token sees 3 to 7
    token 8   [3 4] [5 6] 7 8       the next sees 4 to 8, and 3 waits for 4
    token 9   [5 6] [7 8] 9         the next sees 5 to 9

Where no group fits into the window beside the tail (window - 1 < residual + group) nothing is
packed, and exactly the last window - 1 tokens are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from kvcalc.dtypes import COMPUTE_DTYPES, StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import Layer, PlainLayer
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache
from kvcalc.layers.states import StateLayer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._rows import AttentionLayer, window_of

SOURCE = "KIVI, arXiv:2402.02750, section 3"
WORKS_ON = "full, window, chunked and latent layers; states, cross attention and index keys stay"
PARAMETERS: Mapping[str, int] = {"group": 32, "residual": 128}


def about(bits: int, *, limits: str, headlines: tuple[Headline, ...] = ()) -> About:
    """What is told about a strategy of this file."""
    return About(
        keeps="every token: keys packed in groups of `group` tokens of a channel, values of "
        "`group` channels of a token, the last `residual` tokens and up to a group more as they "
        "are",
        formula=f"{bits}/8 + 2 × bytes of the dtype / group for each value, and the tail; than 16 "
        f"bits {smaller(bits, 32):.4g}× smaller at group 32, {smaller(bits, 64):.4g}× at group 64",
        evicts="nothing; a group is quantised once, when the tail has `residual` + `group` tokens",
        needs="`group` to divide the width of V; for speed a GPU with Triton 3.5, whose kernel "
        "reads what is packed in groups of 16, 32, 64",
        limits=f"{limits}; without that kernel a step unpacks all it attends to",
        headlines=headlines,
    )


def smaller(bits: int, group: int) -> float:
    """How many times smaller than 16 bits a packed value is, with its part of scale and minimum."""
    return 16 / (bits + 2 * 16 / group)


STAYS = (CrossAttention, IndexKeys, NoCache, StateLayer)
"""Parts that keep their dtype: constant ones, and keys that only choose what is attended to."""


def packed_range(tokens: int, *, group: int, residual: int, window: int | None) -> range:
    """Which of `tokens` tokens are packed; those after them are the tail, those before are gone.

    It depends on nothing but the count, however the tokens came. `window` is None for a layer that
    sees all.
    """
    gone = 0 if window is None else max(tokens - window + 1, 0)
    if window is not None and window - 1 < residual + group:
        return range(gone, gone)
    return range(gone // group * group, max(tokens - residual, 0) // group * group)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer(PlainLayer):
    """Rows packed to `bits` bits in groups, each with a scale and a minimum in the model's dtype.

    A key group is `group` tokens of one channel, a value group `group` channels of one token.
    """

    layer: AttentionLayer
    bits: int
    group: int
    residual: int

    @property
    def kind(self) -> str:
        """`packed_int4`."""
        return f"packed_int{self.bits}"

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Packed levels, their scales and minima, and the tail in `dtype`.

        Raises UnsupportedError for a `dtype` that no model computes in.
        """
        check_compute_dtype(f"int{self.bits}", dtype)
        packed, tail = self._counts(tokens)
        heads, key_dim, value_dim = self.layer.rows()
        payload = heads * (key_dim + value_dim) * packed * self.bits // 8
        key_groups = heads * key_dim * (packed // self.group)
        value_groups = heads * packed * (value_dim // self.group)
        scales_and_minima = dtype.row_bytes(2 * (key_groups + value_groups))
        return batch * (payload + scales_and_minima + tail * self.layer.row_bytes(dtype))

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase: each group that is packed frees most of what its tokens held."""
        return None

    def shard(self, tp: int) -> Self:
        """Heads are packed on their own, so each rank packs its part."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """Widths, bits, group and tail."""
        return f"{self.layer.keeps()}, int{self.bits}/{self.group} + tail ≥ {self.residual}"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Payload, groups and tail."""
        packed, tail = self._counts(tokens)
        width = dtype.block_bytes
        payload = {8: "1", 4: "1/2", 2: "1/4"}[self.bits]
        return (
            f"{self.layer.keeps()} × [{packed:,} packed tokens × ({payload} + "
            f"2×{width}/{self.group}) B + {tail:,} tail tokens × {width} B]"
        )

    def _counts(self, tokens: int) -> tuple[int, int]:
        packed = packed_range(
            tokens, group=self.group, residual=self.residual, window=window_of(self.layer)
        )
        return len(packed), tokens - packed.stop


def check_compute_dtype(name: str, dtype: StorageFormat) -> None:
    """Raise UnsupportedError unless a model can compute in `dtype`, as quantised caches need."""
    if dtype.name not in COMPUTE_DTYPES:
        msg = f"{name} starts from a cache in {', '.join(COMPUTE_DTYPES)}, not {dtype.name}"
        raise UnsupportedError(msg)


def quantisable(name: str, layer: Layer) -> AttentionLayer | None:
    """The layer if it keeps rows that can be quantised, None if it stays as it is.

    Raises UnsupportedError for a layer that keeps tokens in a way of its own.
    """
    if isinstance(layer, AttentionLayer):
        return layer
    if isinstance(layer, StateLayer) and any("tokens" in state.name for state in layer.states):
        # CPM-Ant's; in transformers they stand in the cache among the others.
        msg = f"{name} does not cover virtual tokens; deciding field: prompt_length"
        raise UnsupportedError(msg)
    if isinstance(layer, STAYS):
        return None
    msg = f"{name} does not cover layers of kind {layer.kind}, which keep tokens in their own way"
    raise UnsupportedError(msg)


def apply(layer: Layer, parameters: Mapping[str, int], *, bits: int) -> Layer:
    """The layer with its rows packed; what stays comes back as it is.

    Raises InputError for a group below 2 and UnsupportedError when the rows of the layer do not
    divide into groups that fill whole bytes.
    """
    name, group, residual = f"int{bits}", parameters["group"], parameters["residual"]
    if group < 2:
        msg = f"{name}: group must be at least 2, not {group}"
        raise InputError(msg)
    rows = quantisable(name, layer)
    if rows is None:
        return layer
    width = rows.rows().value_dim
    if not _divides(group, width, bits):
        fitting = [
            str(other) for other in range(2, (width or 32) + 1) if _divides(other, width, bits)
        ]
        remedy = f"choose group={', '.join(fitting)}" if fitting else "no group fits"
        msg = (
            f"{name}: V rows of {width} values do not divide into groups of {group} that fill "
            f"whole bytes; {remedy}"
        )
        raise UnsupportedError(msg)
    return PackedLayer(layer=rows, bits=bits, group=group, residual=residual)


def _divides(group: int, width: int, bits: int) -> bool:
    """Whether rows of V divide into groups, and a group's tokens into bytes."""
    return width % group == 0 and group * bits % 8 == 0
