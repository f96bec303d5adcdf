"""No cache: the whole sequence is computed again at every step.

A step makes the K and V of one layer after another and drops them; nothing outlives it.
"""

from collections.abc import Mapping

from kvcalc.layers import Layer
from kvcalc.layers.mixed import NoCache
from kvcalc.strategies._about import About

SUMMARY = "keeps nothing and computes the whole sequence again at every step"
SOURCE = "transformers with use_cache=False"
WORKS_ON = "every model that is sized"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="nothing: K and V of one layer after another are made in a step and dropped",
    formula="0",
    evicts="everything, in each step",
    needs="the arithmetic of a whole prefill for every token",
    limits="a decode step takes as long as a prefill of all tokens so far",
)

RECOMPUTES = True
"""Each step is given the whole sequence."""


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """Nothing, whatever the layer is."""
    del layer, parameters
    return NoCache(reason="computed again at every step")
