"""LAVa (arXiv:2509.09754): layers share one budget by the entropy of their scores, the heads of a
layer share its part; settled after each layer while the prompt goes through them.
"""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import (
    BUDGET,
    WORKS_ON,
    SharingLayer,
    check_alike,
    check_evictable,
    evicted,
)
from kvcalc.strategies._parameters import Pooling, Value
from kvcalc.strategies.ada_kv import check_heads

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "one budget for all heads and layers: more where attention is spread, weighed by values"
SOURCE = "LAVa, arXiv:2509.09754; MGDDestiny/Lava"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 32,
    "kernel": 7,
    "pooling": Pooling.MAX,
    "alpha": 0.2,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt, and of each KV head the tokens that these "
    "attend to most, times the largest |V| of the head; layers by the entropy of these scores, "
    "heads as in ada-kv",
    formula="layers × KV heads × (min(budget, prompt) + decoded tokens), over all layers",
    evicts="while the prompt is fed: after each layer, all layers so far are trimmed",
    needs="attention of the last `window` queries, and the values; layers that keep rows of one "
    "shape",
    limits="the cache never holds more than its budget and one whole layer, but until the last "
    "layer two bytes for each token of the prompt in each KV head. What was trimmed does not come "
    "back. Budgets are rounded together so that their sum is exact",
    headlines=(
        Headline(
            "best of the methods compared",
            "LongBench, Needle in a Haystack, RULER and InfiniteBench (abstract)",
            "",
            "a direction, no figure; a speed of 9× that is quoted elsewhere is not in the abstract",
        ),
    ),
)

WHOLE_PROMPT = LAYERS_SHARE = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """The budget of the average head and layer, and all that is decoded."""
    return evicted("lava", layer, parameters, grows=True, kind=SharingLayer)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict or layers that cannot share,
    InputError for odd parameters.
    """
    check_evictable("lava", layers)
    check_alike("lava", layers)
    check_heads("lava", parameters)
