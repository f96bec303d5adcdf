"""DynamicKV (arXiv:2412.14838): layers share one budget by how many of the best scores are theirs,
settled every few layers while the prompt goes through them.
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
    check_observing,
    evicted,
)
from kvcalc.strategies._parameters import Pooling, Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "snapkv with one budget for all layers, by their part in the best scores so far"
SOURCE = "DynamicKV, arXiv:2412.14838, algorithm 1; DreamMr/DynamicKV"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 8,
    "kernel": 7,
    "pooling": Pooling.AVG,
    "r_max": 10,
    "every": 4,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt and the others that these attend to most, the "
    "same number for each KV head of a layer; a layer's number follows from how many of the best "
    "scores of all layers are its",
    formula="layers × min(budget, prompt) + layers × decoded tokens for each KV head, over all "
    "layers",
    evicts="while the prompt is fed: a layer first keeps up to `r_max` times the budget, and every "
    "`every` layers, and at the last, all layers so far are trimmed",
    needs="attention of the last `window` queries; layers that keep rows of one shape",
    limits="until the last layer the cache holds up to `every` × `r_max` budgets of a layer more, "
    "and a float32 score for each token of the prompt in each KV head. What was trimmed does not "
    "come back: a layer that later deserves more passes it on to others. Budgets are rounded "
    "together so that their sum is exact",
    headlines=(
        Headline(
            "about 90% of the full cache's quality with 1.7% of it",
            "LongBench, four models of 7B and 8B; the first version of the abstract said 85%",
            "",
            "a mean over tasks",
        ),
        Headline(
            "LongBench 40.73 where SnapKV has 40.30, the full cache 41.95",
            "Llama-3-8B-Instruct, 512 tokens",
            "",
            "scores of a trained model",
        ),
    ),
)

WHOLE_PROMPT = LAYERS_SHARE = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """The budget of the average layer, and all that is decoded."""
    return evicted("dynamickv", layer, parameters, grows=True, kind=SharingLayer)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict or layers that cannot share,
    InputError for odd parameters.
    """
    check_evictable("dynamickv", layers)
    check_alike("dynamickv", layers)
    check_observing("dynamickv", parameters, r_max=1, every=1)
