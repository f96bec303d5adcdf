"""What promises share: attention layers whose rows of K and V a strategy keeps in its own way."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from kvcalc.errors import UnsupportedError
from kvcalc.layers import (
    FullAttention,
    LatentAttention,
    Layer,
    Rows,
    SlidingAttention,
    TokenLayer,
    Windowed,
)

AttentionLayer = FullAttention | SlidingAttention | LatentAttention
"""Layers of K and V rows. States, index keys, cross attention and the like stay as they are."""

_OWN_CLASS = frozenset({"minimax_m3_sparse"})
"""Kinds whose cache in transformers is a class of the model's own file, which is left alone."""


def window_of(layer: AttentionLayer) -> int | None:
    """Tokens of a layer's window or chunk, None when it sees all."""
    return layer.window if isinstance(layer, Windowed) else None


def refuse_own_classes(layers: Iterable[Layer], strategy: str) -> None:
    """Raise UnsupportedError for layers whose rows our storage cannot replace."""
    for layer in layers:
        if layer.kind in _OWN_CLASS:
            msg = (
                f"{strategy} does not cover layers of kind {layer.kind}, whose cache is a class of "
                "the model's own; deciding field: layer_types"
            )
            raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows(TokenLayer):
    """The rows that a layer needs between two steps, and no others.

    A token attends to itself, too: with window 4, token 5 attends to [2 3 4 5], so that before it
    comes the three rows [2 3 4] are needed: min(tokens, window - 1).
    """

    layer: AttentionLayer

    def rows(self) -> Rows:
        """Those of the inner layer."""
        return self.layer.rows()

    def tokens_kept(self, tokens: int) -> int:
        """All, or all of a window but the token that comes next."""
        window = window_of(self.layer)
        return tokens if window is None else min(tokens, window - 1)

    def breakpoints(self) -> tuple[int, ...] | None:
        """Growth stops when the window is full."""
        window = window_of(self.layer)
        return () if window is None else (window - 1,)

    def shard(self, tp: int) -> Self:
        """Each rank stores its part."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """As the inner layer."""
        return self.layer.keeps()

    def tokens_formula(self, tokens: int) -> str:
        """The minimum, spelled out."""
        window = window_of(self.layer)
        if window is None:
            return f"{tokens:,} tokens"
        return f"min({tokens:,}, window {window:,} - 1) tokens"
