"""A cache allocated once for the whole sequence, written in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import UnsupportedError
from kvcalc.layers import Layer, PlainLayer
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache
from kvcalc.layers.states import StateLayer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._rows import AttentionLayer

SUMMARY = "allocated once at full length and written in place (prompt + generated tokens)"
SOURCE = "transformers StaticCache"
WORKS_ON = "full-attention, window and latent layers and index keys; states are as they are"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="what dynamic keeps, in storage for all tokens of prompt and answer from the start",
    formula="dynamic at full length, and 8 bytes for each layer",
    evicts="nothing but what falls out of the model's own windows",
    needs="the final length beforehand",
    limits="faster only where steps are compiled or replayed as a CUDA graph; without Triton "
    "attention goes over the whole length, filled or not",
    headlines=(
        Headline(
            "up to 4× faster",
            "with torch.compile, less for larger models (transformers' guide to LLM inference)",
            "tpot",
            "compiled there; here a CUDA graph on GPUs, on CPUs neither",
        ),
    ),
)

COPIES = 0
"""A step attends to the rows where they are."""

COUNTER_BYTES = 8
"""The int64 position at which a layer writes next, kept on the device beside K and V. Index keys
have one of their own.
"""


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
    """The same rows and index keys, all of them allocated at once; states as they are.

    Raises UnsupportedError for a layer that transformers keeps in no static form.
    """
    del parameters
    if isinstance(layer, AttentionLayer | IndexKeys):
        return PreallocatedLayer(layer=layer)
    if isinstance(layer, StateLayer | NoCache | CrossAttention):
        return layer
    msg = f"static: transformers has no static cache for layers of kind {layer.kind}; use dynamic"
    raise UnsupportedError(msg)


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError where no layer keeps anything, and where index keys stand alone: the
    counter of the rows that such a layer could have kept is there all the same, and no part of the
    layer would count it.
    """
    del parameters
    if all(isinstance(part, NoCache) for layer in layers for part in layer.parts()):
        msg = "static: this model keeps no cache, so there is nothing to allocate"
        raise UnsupportedError(msg)
    for layer in layers:
        parts = layer.parts()
        rows = any(isinstance(part, AttentionLayer) for part in parts)
        if not rows and any(isinstance(part, IndexKeys) for part in parts):
            msg = (
                "static does not cover layers that keep index keys and share K and V; use dynamic; "
                "deciding field: kv_source_layers"
            )
            raise UnsupportedError(msg)
