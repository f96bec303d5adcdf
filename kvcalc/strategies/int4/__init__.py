"""4-bit keys and values after KIVI: keys per channel, values per token, and an exact tail."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies import _packed
from kvcalc.strategies._packed import PARAMETERS, SOURCE, WORKS_ON
from kvcalc.strategies._rows import refuse_own_classes

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "packed 4-bit keys (per channel) and values (per token) with a full-precision tail"

STORES = True

BITS = 4

ABOUT = _packed.about(
    BITS,
    limits="nearer a third of the bytes than a quarter, since scales and minima count",
)


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The layer with its rows packed, see `_packed`."""
    return _packed.apply(layer, parameters, bits=BITS)


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model with layers that cannot be replaced."""
    del parameters
    refuse_own_classes(layers, "int4")
