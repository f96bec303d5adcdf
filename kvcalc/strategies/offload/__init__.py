"""K and V of every layer in host memory, fetched one layer ahead of the one that computes.

What is promised for each layer is its host memory. It is allocated once at full length, as in
`static`: host memory that copies run beside must be pinned, and pinning it anew for each token
would cost more than the copies. For `tokens` tokens it is the storage of a cache whose capacity is
exactly `tokens`. A window layer has window - 1 rows, written round and round.

The device holds rows during a step only, at most of two layers at a time: `working_bytes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvcalc.dtypes import StorageFormat
from kvcalc.layers import Layer
from kvcalc.strategies._about import About
from kvcalc.strategies._rows import AttentionLayer, StoredRows, refuse_own_classes

SUMMARY = "keys and values in host memory, fetched one layer ahead; two layers on the device"
SOURCE = "its own storage; the idea is that of transformers' offloaded caches"
WORKS_ON = "full-attention, window and latent layers; states and index keys stay on the device"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="all rows in host memory, and on the device during a step those of two layers",
    formula="host: dynamic at full length, window - 1 tokens in window layers; device: the two "
    "neighbouring layers with the most rows",
    evicts="nothing but what falls out of the model's own windows",
    needs="the final length beforehand, and pinned host memory beside a GPU",
    limits="each step moves the whole cache to the device, and the bus bounds its speed; bytes "
    "held are the host's, what the device has is a figure of its own; on a CPU both are one memory",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedLayer(StoredRows):
    """A layer's rows in host memory."""

    kind: ClassVar[str] = "offloaded"

    def tokens_formula(self, tokens: int) -> str:
        """The rows, and where they are."""
        return f"{StoredRows.tokens_formula(self, tokens)} in host memory"


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """Rows of K and V in host memory; all else as it is."""
    del parameters
    return OffloadedLayer(layer=layer) if isinstance(layer, AttentionLayer) else layer


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model with layers that cannot be replaced."""
    del parameters
    refuse_own_classes(layers, "offload")


def working_bytes(layers: Iterable[Layer], *, tokens: int, batch: int, dtype: StorageFormat) -> int:
    """Most bytes of K and V on the device while the last of `tokens` tokens is decoded.

    `layers` are a model's, in order, as an engine lays them out. A layer is on the device with the
    rows it had and the new token's: min(tokens, window). While it computes, the next one is
    fetched, so that it is the two neighbours that take most.
    """
    rows = [
        sum(
            part.num_bytes(tokens=tokens, batch=batch, dtype=dtype)
            for part in layer.parts()
            if isinstance(part, AttentionLayer)
        )
        for layer in layers
    ]
    stored = [one for one in rows if one]
    return max((one + following for one, following in pairwise([*stored, 0])), default=0)


def figures(
    layers: Iterable[Layer],
    parameters: Mapping[str, int],
    *,
    tokens: int,
    batch: int,
    dtype: StorageFormat,
) -> dict[str, int]:
    """What is on the device during a decode step."""
    del parameters
    return {"device_bytes": working_bytes(layers, tokens=tokens, batch=batch, dtype=dtype)}
