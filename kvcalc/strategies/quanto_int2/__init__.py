"""2-bit keys and values by optimum-quanto, as transformers' QuantizedCache has it."""

from collections.abc import Mapping

from kvcalc.layers import Layer
from kvcalc.strategies import _library
from kvcalc.strategies._library import PARAMETERS, SOURCE, WORKS_ON

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply"]

SUMMARY = "2-bit by optimum-quanto, requantised whole every `residual` tokens"

BACKEND, BITS = "quanto", 2

ABOUT = _library.about(
    BACKEND,
    BITS,
    limits="key_axis=0 puts channels of a token together, where one large channel hurts all",
)


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The layer as the library quantises it, see `_library`."""
    return _library.apply(layer, parameters, backend=BACKEND, bits=BITS)
