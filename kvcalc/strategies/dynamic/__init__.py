"""The plain growing cache: every token a layer must keep, in the model's dtype."""

from collections.abc import Mapping

from kvcalc.layers import Layer
from kvcalc.strategies._about import About

SUMMARY = "grows with the sequence; window layers keep their window (the baseline)"
SOURCE = "transformers DynamicCache"
WORKS_ON = "every model that is sized"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="every token where a layer sees all, the last `window` where it has a window, states as "
    "they are",
    formula="tokens × KV heads × (K + V width) × bytes of the dtype, summed over the layers",
    evicts="nothing but what falls out of the model's own windows",
    needs="nothing",
    limits="grows with every token; a step copies each layer's rows to append to them",
)

COPIES = 1
"""A step makes a layer's rows once more, in one piece."""


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """As it is."""
    del parameters
    return layer
