"""A linear scorer of keys, fitted on the spot to the model's own attention: learned eviction
without a download.
"""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of a prompt, the keys that a linear probe, fitted on its beginning, scores highest"
SOURCE = "no paper: stands in for learned scorers (KVzap and the like), which need trained weights"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "window": 32, "calibration": 0.25}
ABOUT = About(
    keeps="the last `window` tokens, and the others whose keys a ridge regression scores highest",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there",
    needs="attention of the first `calibration` of the prompt, to fit log of the mean attention "
    "that a key gets from later queries; the rest of the prompt is scored without attention",
    limits="a probe, not any paper's method; what keys do not show it cannot know. Its correlation "
    "with attention on tokens it was not fitted to is reported",
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("probe", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("probe", layers)
