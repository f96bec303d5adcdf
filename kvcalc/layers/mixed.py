"""Layers that keep nothing, several things at once, or rows beside K and V."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Self

from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.errors import InputError
from kvcalc.layers import (
    FullAttention,
    HeadsLayer,
    LatentAttention,
    Layer,
    PlainLayer,
    Setting,
    Windowed,
)
from kvcalc.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCache(PlainLayer):
    """A decoder layer that keeps nothing: an MLP, or attention over another layer's K and V."""

    kind: ClassVar[str] = "no_cache"
    reason: str

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Nothing."""
        del tokens, batch, dtype
        return 0

    def shard(self, tp: int) -> Self:
        """Nothing on every rank."""
        del tp
        return self

    def keeps(self) -> str:
        """Why it keeps nothing."""
        return f"nothing ({self.reason})"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Likewise."""
        del tokens, dtype
        return self.keeps()


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """A layer that keeps all that each of its `members` keeps."""

    kind: str
    members: tuple[Layer, ...]

    def bind(self, setting: Setting) -> Self:
        """Each member under the setting."""
        return replace(self, members=tuple(member.bind(setting) for member in self.members))

    def parts(self) -> tuple[Layer, ...]:
        """Those of its members."""
        return tuple(chain.from_iterable(member.parts() for member in self.members))

    def each(self, change: Callable[[Layer], Layer]) -> Self:
        """Each member's parts changed."""
        return replace(self, members=tuple(member.each(change) for member in self.members))

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """The sum over the members."""
        return sum(
            member.num_bytes(tokens=tokens, batch=batch, dtype=dtype) for member in self.members
        )

    def breakpoints(self) -> tuple[int, ...] | None:
        """Wherever a member has one."""
        found: set[int] = set()
        for member in self.members:
            breakpoints = member.breakpoints()
            if breakpoints is None:
                return None
            found.update(breakpoints)
        return tuple(sorted(found))

    def shard(self, tp: int) -> Self:
        """Each member's part."""
        return replace(self, members=tuple(member.shard(tp) for member in self.members))

    def keeps(self) -> str:
        """What the members keep, one after another."""
        return " + ".join(member.keeps() for member in self.members)

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """A sum."""
        return " + ".join(member.formula(tokens=tokens, dtype=dtype) for member in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttention(HeadsLayer):
    """Attention to an encoder's output, whose K and V are computed once and kept.

    `encoder_tokens` is set by `bind`, from the user's number or else `default_tokens`; both are
    None where only the user can know it.
    """

    kind: ClassVar[str] = "cross_attention"
    kv_heads: int
    key_dim: int
    value_dim: int
    default_tokens: int | None = None
    encoder_tokens: int | None = None

    def bind(self, setting: Setting) -> Self:
        """With the length of the encoder's output; InputError when there is none."""
        given = setting.encoder_tokens
        tokens = self.default_tokens if given is None else given
        if tokens is None:
            msg = (
                "the model keeps K and V of its encoder's output: give its length with "
                "--encoder-seq (encoder_seq in Python)"
            )
            raise InputError(msg)
        return replace(self, encoder_tokens=tokens)

    def tokens_kept(self, tokens: int) -> int:
        """The encoder's, whatever the decoder's."""
        del tokens
        return self.encoder_tokens or 0

    def keeps(self) -> str:
        """Heads and widths, and of what."""
        return f"encoder {HeadsLayer.keeps(self)}"

    def tokens_formula(self, tokens: int) -> str:
        """The encoder's tokens."""
        return f"{self.tokens_kept(tokens):,} encoder tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexKeys(PlainLayer):
    """One key of `dim` values for each token, by which an indexer picks what is attended to.

    Kept on every tensor-parallel rank. `storage` is a format of `kvcalc.dtypes`, "" for the dtype
    that the model computes in, or FP8_SCALED; `position_bytes` are kept beside each key.
    """

    FP8_SCALED: ClassVar[str] = "fp8 + scale"
    """One byte a value and a 4-byte scale for each 128 values (DeepSeek-V3.2's indexer)."""

    kind: ClassVar[str] = "index_keys"
    dim: int
    storage: str = ""
    position_bytes: int = 0

    def bind(self, setting: Setting) -> Self:
        """With the compute dtype by name."""
        return replace(self, storage=self.storage or setting.compute.name)

    def key_bytes(self, dtype: StorageFormat) -> int:
        """Bytes kept for a token."""
        if self.storage == self.FP8_SCALED:
            return self.dim + 4 * ceil_div(self.dim, 128)
        stored = FORMATS[self.storage] if self.storage else dtype
        return stored.row_bytes(self.dim) + self.position_bytes

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """A key for each token."""
        return batch * tokens * self.key_bytes(dtype)

    def shard(self, tp: int) -> Self:
        """The whole key on every rank."""
        del tp
        return self

    def keeps(self) -> str:
        """The key's width."""
        return f"index key {self.dim}" + f" ({self.storage})" * bool(self.storage)

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Bytes of a key × tokens."""
        return f"{self.keeps()} {self.key_bytes(dtype)} B × {tokens:,} tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingLatent(Windowed, LatentAttention):
    """Latent attention over the last `window` tokens."""

    kind: ClassVar[str] = "sliding_latent_attention"
    window: int


def with_cross_attention(layer: Layer, *, default_tokens: int | None = None) -> Layer:
    """The layer of an encoder–decoder: its own K and V, and those of the encoder's output with the
    same heads.
    """
    if not isinstance(layer, FullAttention):
        return layer
    cross = CrossAttention(
        kv_heads=layer.kv_heads,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        default_tokens=default_tokens,
    )
    return Combined(kind="self_and_cross_attention", members=(layer, cross))
