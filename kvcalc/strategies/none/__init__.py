"""No cache: the whole sequence is computed again at every step.

A step makes the K and V of one layer after another and drops them; nothing outlives it.
"""

from collections.abc import Mapping

from kvcalc.layers import Layer
from kvcalc.layers.mixed import NoCache

SUMMARY = "keeps nothing and computes the whole sequence again at every step"
SOURCE = "transformers with use_cache=False"
WORKS_ON = "every model that is sized"
PARAMETERS: Mapping[str, int] = {}

RECOMPUTES = True
"""Each step is given the whole sequence."""


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """Nothing, whatever the layer is."""
    del layer, parameters
    return NoCache(reason="computed again at every step")
