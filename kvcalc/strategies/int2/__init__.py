"""2-bit keys and values after KIVI: keys per channel, values per token, and an exact tail."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies import _packed
from kvcalc.strategies._about import Headline
from kvcalc.strategies._packed import PARAMETERS, SOURCE, WORKS_ON
from kvcalc.strategies._rows import refuse_own_classes

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "packed 2-bit keys (per channel) and values (per token) with a full-precision tail"

STORES = True

BITS = 2

ABOUT = _packed.about(
    BITS,
    limits="four levels for a value; nearer a fifth of the bytes than an eighth",
    headlines=(
        Headline(
            "2.6× less peak memory",
            "2 bits, Llama, Falcon and Mistral, weights included (abstract of KIVI)",
            "",
            "a peak with the weights in it and a large batch; peaks here are above the weights",
        ),
        Headline(
            "2.35-3.47× the throughput",
            "2 bits, with up to 4× the batch (abstract of KIVI)",
            "",
            "throughput of the larger batch that fits, no faster step",
        ),
    ),
)


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The layer with its rows packed, see `_packed`."""
    return _packed.apply(layer, parameters, bits=BITS)


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model with layers that cannot be replaced."""
    del parameters
    refuse_own_classes(layers, "int2")
