"""TOVA (arXiv:2401.06104): at every step the token that the newest one attends to least goes."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "what the newest token attends to most, the same tokens for all heads of a layer"
SOURCE = "TOVA, arXiv:2401.06104; the average over heads as in schwartz-lab-NLP/TOVA"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET}
ABOUT = About(
    keeps="the newest token and those that it attends to most, on average over all query heads of "
    "the layer",
    formula="min(budget, tokens) for each KV head",
    evicts="after the prompt, and at every step after it",
    needs="attention of one query",
    limits="what a single token has no use for is gone, whatever the next one asks; tokens keep "
    "their own positions, where the authors close the gaps",
    headlines=(
        Headline(
            "nearly on par with 1/8 of the cache",
            "in some cases, of four long-range tasks and several models",
            "",
            "points of a benchmark",
        ),
        Headline(
            "4.8× the throughput",
            "with 1/8 of the cache",
            "",
            "comes from larger batches in the memory that is saved",
        ),
    ),
)

WHOLE_PROMPT = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A fixed number of rows."""
    return evicted("tova", layer, parameters, grows=False)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("tova", layers)
