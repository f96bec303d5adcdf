"""Keys and values quantised by optimum-quanto or hqq, as transformers' QuantizedCache does it: what
the strategies quanto-int4, quanto-int2, hqq-int8, hqq-int4 and hqq-int2 promise.

Each time that `residual` tokens have gathered in full precision the whole cache is dequantised,
joined with them and quantised again (cache_utils.py of transformers 5.23.0, QuantizedLayer). There
a prompt is quantised at once whatever its length, so that bytes depend on how tokens came; here
what is beyond a multiple of `residual` waits in full precision, so that they depend on the count
alone. With residual 4:

    token 3   1 2 3
    token 4   [1 2 3 4]
    token 7   [1 2 3 4] 5 6 7
    token 8   [1 2 3 4 5 6 7 8]     [1 2 3 4] a second time

With E values of K (or V) quantised in groups of G, b bytes in the model's dtype and n bits, K (or
V) takes pack(E) + 2 × E/G × b bytes: a scale and a shift or zero for each group. pack(E) is E×n/8,
in quanto rounded up to whole rows of packed groups.

Groups go through [batch, heads, tokens, width] in memory order; `key_axis` says how those of keys
lie, as `axis_key` of transformers (quanto's last axis, -1 there, is 1 here):

    quanto 0, hqq 1   G consecutive values: channels of one token
    quanto 1          G rows of one channel: successive tokens
    hqq 0             G values E/G apart: mostly one channel

Values are quantised along axis 0, the default of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import FullAttention, LatentAttention, Layer, PlainLayer
from kvcalc.layers.mixed import SlidingLatent
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._packed import check_compute_dtype, smaller
from kvcalc.units import ceil_div

SOURCE = "transformers QuantizedCache (cache_utils.py 5.23.0)"
WORKS_ON = "models of full-attention or latent layers alone"
PARAMETERS: Mapping[str, int] = {"group": 64, "residual": 128, "key_axis": 0}

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
"""The library that each backend of QuantizedCache needs."""

BLOG = "Hugging Face's post on KV cache quantisation"

PERPLEXITY = Headline(
    "almost the perplexity of fp16",
    f"Llama-2-7B-chat on PG-19, group 64, residual 128 ({BLOG})",
    "",
    "there of a book; --text gives it here",
)
"""Of 4 bits, with either library."""


def about(
    backend: str, bits: int, *, limits: str = "", headlines: tuple[Headline, ...] = ()
) -> About:
    """What is told about a strategy of this file."""
    return About(
        keeps="every token, quantised in groups of `group` values; up to `residual` - 1 of the "
        "last as they are",
        formula=f"{bits}/8 + 2 × bytes of the dtype / group for each value, and the tail; than 16 "
        f"bits {smaller(bits, 64):.4g}× smaller at group 64",
        evicts="nothing; every `residual` tokens all of it is dequantised, joined with them and "
        "quantised again",
        needs=f"the library {PACKAGES[backend]}, and a model without windows and states",
        limits="values are rounded again and again; each step dequantises the whole cache"
        f"{limits and f'; {limits}'}",
        headlines=headlines,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryLayer(PlainLayer):
    """Rows quantised by a library, and a tail of fewer than `residual` tokens."""

    layer: FullAttention | LatentAttention
    backend: str
    bits: int
    group: int
    residual: int
    key_axis: int

    @property
    def kind(self) -> str:
        """`quanto_int4`."""
        return f"{self.backend}_int{self.bits}"

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Packed values, two numbers in `dtype` for each group, and the tail in `dtype`.

        Raises UnsupportedError for a `dtype` that no model computes in.
        """
        check_compute_dtype(self.kind.replace("_", "-"), dtype)
        heads, key_dim, value_dim = self.layer.rows()
        quantised = quantised_tokens(tokens, residual=self.residual)
        tail = batch * (tokens - quantised) * self.layer.row_bytes(dtype)
        keys = self._quantised_bytes(batch * heads * quantised * key_dim, self.key_axis, dtype)
        values = self._quantised_bytes(batch * heads * quantised * value_dim, 0, dtype)
        return keys + values + tail

    def _quantised_bytes(self, elements: int, axis: int, dtype: StorageFormat) -> int:
        groups = elements // self.group
        in_a_byte = 8 // self.bits
        if self.backend == "quanto" and axis == 0:
            packed = ceil_div(groups, in_a_byte) * self.group
        elif self.backend == "quanto":
            packed = ceil_div(self.group, in_a_byte) * groups
        else:
            packed = elements // in_a_byte
        return packed + dtype.row_bytes(2 * groups)

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase: `residual` tokens at a time are quantised."""
        return None

    def shard(self, tp: int) -> Self:
        """Its part of the heads."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """Widths, bits, group and tail."""
        name = f"{self.backend} int{self.bits}/{self.group}"
        return f"{self.layer.keeps()}, {name} + tail < {self.residual}"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Payload, groups and tail."""
        quantised = quantised_tokens(tokens, residual=self.residual)
        width = dtype.block_bytes
        return (
            f"{self.layer.keeps()} × [{quantised:,} quantised tokens × ({self.bits}/8 + "
            f"2×{width}/{self.group}) B + {tokens - quantised:,} tail tokens × {width} B]"
        )


def quantised_tokens(tokens: int, *, residual: int) -> int:
    """How many of `tokens` tokens are quantised; it depends on nothing but the count."""
    return tokens // residual * residual


def apply(layer: Layer, parameters: Mapping[str, int], *, backend: str, bits: int) -> Layer:
    """The layer as the library quantises it.

    Raises InputError for parameters out of range and UnsupportedError for what QuantizedCache
    refuses (windows, states, cross attention) and for rows that do not divide into groups.
    """
    name = f"{backend}-int{bits}"
    group, residual, key_axis = (parameters[key] for key in PARAMETERS)
    for key, value, least in (("group", group, 2), ("residual", residual, 1)):
        if value < least:
            msg = f"{name}: {key} must be at least {least}, not {value}"
            raise InputError(msg)
    if key_axis not in (0, 1):
        msg = f"{name}: key_axis must be 0 or 1, not {key_axis}"
        raise InputError(msg)
    if not isinstance(layer, FullAttention | LatentAttention) or isinstance(layer, SlidingLatent):
        msg = (
            f"{name} does not cover {layer.kind}: transformers' QuantizedCache takes models of "
            f"full-attention layers alone; int{bits} covers more"
        )
        raise UnsupportedError(msg)
    heads, key_dim, value_dim = layer.rows()
    for side, width, axis in (("K", key_dim, key_axis), ("V", value_dim, 0)):
        if not _divides(backend, 8 // bits, axis, heads * residual, width, group):
            msg = (
                f"{name}: {residual} tokens of {heads} × {width} {side} do not divide into groups "
                f"of {group} that fill whole bytes; choose another group or residual"
            )
            raise UnsupportedError(msg)
    return LibraryLayer(
        layer=layer, backend=backend, bits=bits, group=group, residual=residual, key_axis=key_axis
    )


def _divides(backend: str, in_a_byte: int, axis: int, rows: int, width: int, group: int) -> bool:
    """Whether the library takes `rows` rows, and so any multiple of them, in groups.

    quanto groups within one sequence (axis 0) or one channel (axis 1). hqq packs along the axis
    that it groups (axis 0) or along the groups (axis 1), and needs whole bytes there.
    """
    if width == 0:
        return False
    if backend == "quanto":
        return (rows if axis else rows * width) % group == 0
    packed_along = rows * width // group if axis else group
    return rows * width % group == 0 and packed_along % in_a_byte == 0
