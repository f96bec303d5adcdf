"""MiniCache (arXiv:2405.14366): the K and V of two neighbouring layers in one.

Of a token's rows in both layers the direction is kept once and the norm twice. Tokens whose rows
differ most in direction are kept as they are besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Self, cast

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import FullAttention, LatentAttention, Layer, PlainLayer, Setting
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import check_evictable, sees_all
from kvcalc.strategies._parameters import Value

SUMMARY = "two neighbouring layers share the directions of their keys and values"
SOURCE = "MiniCache, arXiv:2405.14366 (NeurIPS 2024), section 4"
WORKS_ON = "full-attention layers, in pairs; windows and states stay as they are"
PARAMETERS: Mapping[str, Value] = {"start": 0.5, "t": 0.6, "gamma": 0.05}
ABOUT = About(
    keeps="of the prompt, in pairs of layers from the share `start` of them on: a direction for "
    "both, `t` of the way from the lower layer's to the upper's, a norm for each, and the share "
    "`gamma` of the rows as they are",
    formula="for a pair, each of K and V and each KV head: prompt × (width + 2) + "
    "floor(gamma × prompt) × (2 × width, and an int32) + 2 × decoded × width",
    evicts="nothing; rows are merged once, when the prompt is there, and decoded ones kept whole",
    needs="nothing but the rows; two layers of the prompt whole at a time",
    limits="rows come back changed, and each step restores them; the paper keeps tokens beyond a "
    "distance, here it is the same share for every head, so that bytes are known",
    headlines=(
        Headline(
            "1.53× compression by merging alone",
            "Llama-2-7B, ShareGPT",
            "bytes",
            "merging the upper half cannot give more than 1.33×, and gives 1.28× with `gamma` "
            "0.05; the published ratio needs an earlier `start`",
        ),
        Headline(
            "up to 5.02× compression",
            "Llama-2-7B, ShareGPT, with 4-bit quantisation",
            "",
            "most of it is the quantisation's: 4 bits are about 4× of it",
        ),
        Headline(
            "41% less memory, about 5× the throughput",
            "with 4-bit quantisation",
            "",
            "the footprint of a server with its weights, quantised besides",
        ),
    ),
)

WHOLE_PROMPT = ALTERS = True

INDEX_BYTES = 4
"""The int32 that says where a row stood which is kept as it is."""


class Role(Enum):
    """What a layer is in a pair; those that are in none are whole."""

    WHOLE = "whole"
    LOWER = "lower"
    UPPER = "upper"

    @classmethod
    def of(cls, place: int, places: int, start: float) -> "Role":
        """Of layer `place` of `places`: the pairs of 5 from a start of 0.4 on are 2 3, and 4 is
        left alone.
        """
        above = place - int(start * places)
        if above < 0 or (above % 2 == 0 and place == places - 1):
            return cls.WHOLE
        return cls.UPPER if above % 2 else cls.LOWER


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayer(PlainLayer):
    """One of a pair. What both have is counted in the lower one; a prompt's length is bound."""

    layer: FullAttention
    role: Role
    gamma: float
    prompt_tokens: int | None = None

    @property
    def kind(self) -> str:
        """`merged_lower` and `merged_upper`."""
        return f"merged_{self.role.value}"

    def bind(self, setting: Setting) -> Self:
        """With the length of the prompt."""
        return replace(self, prompt_tokens=setting.prompt_tokens)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Directions (of both), norms, rows kept as they are with their places (of both), and
        decoded rows.
        """
        prompt, decoded, unmerged = self._split(tokens)
        row_bytes = self.layer.row_bytes(dtype)
        heads = self.layer.rows().kv_heads
        own = (unmerged + decoded) * row_bytes + prompt * dtype.row_bytes(2 * heads)
        shared = prompt * row_bytes + unmerged * 2 * heads * INDEX_BYTES
        return batch * (own + shared * (self.role is Role.LOWER))

    def breakpoints(self) -> tuple[int, ...] | None:
        """Where the prompt ends decides, so that one length alone says nothing."""
        return None

    def shard(self, tp: int) -> Self:
        """Heads are merged one by one, so each rank keeps its heads' part."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """As the layer, merged."""
        return f"{self.layer.keeps()}, merged ({self.role.value} layer of a pair)"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The terms of `num_bytes`."""
        prompt, decoded, unmerged = self._split(tokens)
        row_bytes, heads = self.layer.row_bytes(dtype), self.layer.rows().kv_heads
        shared = f"{prompt:,} directions × {row_bytes} B + " * (self.role is Role.LOWER)
        places = f" + {unmerged:,} × {2 * heads} × {INDEX_BYTES} B places" * (
            self.role is Role.LOWER
        )
        return (
            f"{shared}{prompt:,} × {dtype.row_bytes(2 * heads)} B norms + ({unmerged:,} unmerged + "
            f"{decoded:,} decoded) × {row_bytes} B{places}"
        )

    def _split(self, tokens: int) -> tuple[int, int, int]:
        prompt = tokens if self.prompt_tokens is None else min(self.prompt_tokens, tokens)
        return prompt, tokens - prompt, unmerged_tokens(prompt, self.gamma)


def unmerged_tokens(prompt_tokens: int, gamma: float) -> int:
    """Tokens of a prompt that are kept as they are, for each head of K and of V."""
    return int(gamma * prompt_tokens)


def apply_all(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> list[Layer]:
    """Pairs from the start on; equal layers of equal roles become one object."""
    start, gamma = (cast("float", parameters[key]) for key in ("start", "gamma"))
    places = len(_evicting(layers))
    merged: dict[tuple[int, Role], Layer] = {}
    numbers = count()

    def change(part: Layer) -> Layer:
        if not sees_all(part):
            return part
        role = Role.of(next(numbers), places, start)
        if role is Role.WHOLE or isinstance(part, LatentAttention):
            return part
        new = MergedLayer(layer=part, role=role, gamma=gamma)
        return merged.setdefault((id(part), role), new)

    return [layer.each(change) for layer in layers]


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise InputError for shares that are none, UnsupportedError for a model without two layers
    alike to merge.
    """
    for key, value in parameters.items():
        if not 0 <= cast("float", value) <= 1:
            msg = f"minicache: {key} must be from 0 to 1, not {value}"
            raise InputError(msg)
    check_evictable("minicache", layers)
    parts = _evicting(layers)
    if any(isinstance(part, LatentAttention) for part in parts):
        msg = (
            "minicache merges K and V of heads; latents of two layers are expanded by different "
            "weights, so that their directions say nothing of each other"
        )
        raise UnsupportedError(msg)
    start = cast("float", parameters["start"])
    roles = [Role.of(place, len(parts), start) for place in range(len(parts))]
    uppers = [place for place, role in enumerate(roles) if role is Role.UPPER]
    if not uppers:
        msg = (
            f"minicache has nothing to merge: there are not two full-attention layers from the "
            f"share {start:g} of {len(parts)} on; give a smaller start"
        )
        raise UnsupportedError(msg)
    for place in uppers:
        if parts[place].rows() != parts[place - 1].rows():
            msg = f"minicache cannot merge layers whose rows differ: {place - 1} and {place}"
            raise UnsupportedError(msg)


def _evicting(layers: Sequence[Layer]) -> list[FullAttention | LatentAttention]:
    return [part for layer in layers for part in layer.parts() if sees_all(part)]
