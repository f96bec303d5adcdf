"""The plain growing cache: every token a layer must keep, in the model's dtype."""

from collections.abc import Mapping

from kvcalc.layers import Layer

SUMMARY = "grows with the sequence; window layers keep their window (the baseline)"
SOURCE = "transformers DynamicCache"
WORKS_ON = "every model that is sized"
PARAMETERS: Mapping[str, int] = {}

COPIES = 1
"""A step makes a layer's rows once more, in one piece."""


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """As it is."""
    del parameters
    return layer
