"""4-bit keys and values by optimum-quanto, as transformers' QuantizedCache has it."""

from collections.abc import Mapping

from kvcalc.layers import Layer
from kvcalc.strategies import _library
from kvcalc.strategies._about import Headline
from kvcalc.strategies._library import PARAMETERS, SOURCE, WORKS_ON

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply"]

SUMMARY = "4-bit by optimum-quanto, requantised whole every `residual` tokens"

BACKEND, BITS = "quanto", 4

ABOUT = _library.about(
    BACKEND,
    BITS,
    limits="key_axis=0 puts channels of a token together, where one large channel hurts all",
    headlines=(
        _library.PERPLEXITY,
        Headline(
            "about 2.5× less memory",
            f"int4 ({_library.BLOG})",
            "",
            "of a GPU's memory, as its plots show it",
        ),
        Headline(
            "128k tokens instead of 40k",
            f"A100 80GB, with FlashAttention ({_library.BLOG})",
            "",
            "the longest context that fits",
        ),
    ),
)


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The layer as the library quantises it, see `_library`."""
    return _library.apply(layer, parameters, backend=BACKEND, bits=BITS)
