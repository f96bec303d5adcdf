"""What one decoder layer keeps in the cache: small frozen objects that know their own bytes.

A layer counts what the architecture must keep. Engines and strategies turn a layer into another
layer; they never change how one counts. Shapes are those of one sequence: K is
[kv_heads, tokens, key_dim] and V is [kv_heads, tokens, value_dim].

The layers of most models stand here; what fewer models keep (recurrent states, cross attention,
index keys, compressed tokens) stands in the modules beside, which only their families import.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, Self, cast

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import UnsupportedError


class Rows(NamedTuple):
    """The shape of one token's rows: `kv_heads` rows of `key_dim` and of `value_dim` values."""

    kv_heads: int
    key_dim: int
    value_dim: int


class Setting(NamedTuple):
    """What a layer must be told besides the length of the sequence.

    `compute` is the format that states are kept in which no `--kv-dtype` quantises;
    `encoder_tokens` the length of the encoder's output, None when nobody gave it; `prompt_tokens`
    that of the prompt, None where it changes nothing.
    """

    compute: StorageFormat
    encoder_tokens: int | None
    prompt_tokens: int | None = None


class Layer(Protocol):
    """One layer's share of the cache."""

    @property
    def kind(self) -> str:
        """What sort of layer it is, in the words of transformers' `layer_types`."""

    def bind(self, setting: Setting) -> "Layer":
        """The layer under this setting; InputError when it needs one that is not given."""

    def parts(self) -> "tuple[Layer, ...]":
        """The simple layers it is made of."""

    def each(self, change: "Callable[[Layer], Layer]") -> "Layer":
        """The layer with `change` applied to each of its parts."""

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Bytes kept for `batch` sequences of `tokens` tokens each."""

    def breakpoints(self) -> tuple[int, ...] | None:
        """Lengths at which bytes per token change; None when growth is not piecewise linear."""

    def shard(self, tp: int) -> Self:
        """The part that one of `tp` tensor-parallel ranks keeps; UnsupportedError if undefined."""

    def keeps(self) -> str:
        """What is kept for a token, for a person: `8 KV heads × (128 K + 128 V)`."""

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The byte count of one sequence with its numbers in it."""


class PlainLayer:
    """Base of layers that have no parts, need no setting and grow along one line, if at all."""

    __slots__ = ()

    def bind(self, setting: Setting) -> Self:
        """As it is."""
        del setting
        return self

    def parts(self) -> tuple[Self, ...]:
        """The layer is its own only part."""
        return (self,)

    def each(self, change: Callable[[Layer], Layer]) -> Layer:
        """What its only part becomes."""
        return change(cast("Layer", self))

    def breakpoints(self) -> tuple[int, ...] | None:
        """One straight line unless a subclass says otherwise."""
        return ()


class TokenLayer(PlainLayer):
    """Base of layers that keep rows of K and V for each token kept."""

    __slots__ = ()

    def rows(self) -> Rows:
        """Shape of one token's rows."""
        raise NotImplementedError

    def tokens_kept(self, tokens: int) -> int:
        """How many of `tokens` tokens have their rows in the cache."""
        return tokens

    def row_bytes(self, dtype: StorageFormat) -> int:
        """Bytes of one token's K and V rows."""
        heads, key_dim, value_dim = self.rows()
        return dtype.row_bytes(heads * key_dim) + dtype.row_bytes(heads * value_dim)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Rows of the tokens kept, for each sequence."""
        return batch * self.tokens_kept(tokens) * self.row_bytes(dtype)

    def keeps(self) -> str:
        """Heads and widths."""
        heads, key_dim, value_dim = self.rows()
        widths = f"({key_dim} K + {value_dim} V)" if value_dim else f"{key_dim} (K = V)"
        return f"{heads} KV head{'s' * (heads > 1)} × {widths}"

    def tokens_formula(self, tokens: int) -> str:
        """The token factor of `formula`."""
        return f"{tokens:,} tokens"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Rows × bytes of an element × tokens kept."""
        element = f"{dtype.block_bytes}" + f"/{dtype.block_elements}" * (dtype.block_elements > 1)
        return f"{self.keeps()} × {element} B × {self.tokens_formula(tokens)}"


class HeadsLayer(TokenLayer):
    """Base of layers that keep K and V of KV heads, which tensor parallelism splits."""

    __slots__ = ()
    kv_heads: int
    key_dim: int
    value_dim: int

    def rows(self) -> Rows:
        """Heads and widths."""
        return Rows(self.kv_heads, self.key_dim, self.value_dim)

    def shard(self, tp: int) -> Self:
        """Some of the heads."""
        heads = per_rank(self.kv_heads, tp, what="KV heads")
        return replace(self, kv_heads=heads)  # type: ignore[type-var] # subclasses are dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class FullAttention(HeadsLayer):
    """Softmax attention over the whole sequence (MHA, GQA, MQA): every token is kept."""

    kind: ClassVar[str] = "full_attention"
    kv_heads: int
    key_dim: int
    value_dim: int


class Windowed:
    """Mixed into layers that keep at most the last `window` tokens."""

    __slots__ = ()
    window: int

    def tokens_kept(self, tokens: int) -> int:
        """At most one window."""
        return min(tokens, self.window)

    def breakpoints(self) -> tuple[int, ...] | None:
        """Growth stops when the window is full."""
        return (self.window,)

    def tokens_formula(self, tokens: int) -> str:
        """The minimum, spelled out."""
        return f"min({tokens:,}, window {self.window:,}) tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingAttention(Windowed, HeadsLayer):
    """Attention over the last `window` tokens, the new one among them.

    With window 4, token 5 attends to [2 3 4 5]: min(tokens, window) rows must be kept.
    """

    kind: ClassVar[str] = "sliding_attention"
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int


class ChunkedAttention(SlidingAttention):
    """Attention within chunks of `window` tokens; never more than a whole chunk must be kept.

    A runtime that keeps a sliding cache for it keeps min(tokens, chunk) rows.
    """

    __slots__ = ()
    kind: ClassVar[str] = "chunked_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention(TokenLayer):
    """Multi-head latent attention: one compressed latent and one rotary key for each token.

    `num_heads`, `nope_dim` and `head_value_dim` do not change what must be kept; they say what
    a runtime that expands the latent stores instead.
    """

    kind: ClassVar[str] = "latent_attention"
    latent_dim: int
    rope_dim: int
    num_heads: int
    nope_dim: int
    head_value_dim: int

    def rows(self) -> Rows:
        """One row: the latent in the place of K, the rotary key in that of V."""
        return Rows(1, self.latent_dim, self.rope_dim)

    def keeps(self) -> str:
        """Latent and rotary widths."""
        return f"(latent {self.latent_dim} + rope key {self.rope_dim})"

    def shard(self, tp: int) -> Self:
        """Every rank keeps the whole latent: it has no head dimension to split."""
        del tp
        return self

    def expanded(self) -> FullAttention:
        """The K and V of every head, as a runtime stores them that does not keep the latent."""
        return FullAttention(
            kv_heads=self.num_heads,
            key_dim=self.nope_dim + self.rope_dim,
            value_dim=self.head_value_dim,
        )


def per_rank(count: int, tp: int, *, what: str) -> int:
    """Heads (or groups) of one rank: split evenly, or replicated when there are fewer than ranks.

    Raises UnsupportedError when neither is possible.
    """
    if count % tp == 0:
        return count // tp
    if tp % count == 0:
        return 1
    msg = (
        f"{count} {what} can be neither split evenly over --tp {tp} nor replicated; "
        f"use a tp that divides {count} or is a multiple of it"
    )
    raise UnsupportedError(msg)
