"""Only the last tokens: a window put on a model that was trained without one."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "the last tokens and no others, at every step"
SOURCE = "no paper: window attention, which StreamingLLM (arXiv:2309.17453) shows to fail"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET}
ABOUT = About(
    keeps="the last `budget` tokens",
    formula="min(budget, tokens) for each KV head",
    evicts="after the prompt, and at every step after it",
    needs="nothing",
    limits="a baseline: once the first tokens are gone, models that lean on them break down; "
    "sink-window keeps these",
)

WHOLE_PROMPT = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A fixed number of rows."""
    return evicted("recency", layer, parameters, grows=False)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("recency", layers)
