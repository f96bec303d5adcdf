"""Ada-KV (arXiv:2407.11550): the heads of a layer share its budget by how widely they attend."""

from collections.abc import Mapping, Sequence

from kvcalc.errors import InputError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import (
    BUDGET,
    WORKS_ON,
    check_evictable,
    check_observing,
    evicted,
)
from kvcalc.strategies._parameters import Pooling, Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "snapkv with one budget for all heads of a layer: the best rows count, whosever they are"
SOURCE = "Ada-KV, arXiv:2407.11550, algorithm 1; FFY0/AdaKV"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 32,
    "kernel": 7,
    "pooling": Pooling.MAX,
    "alpha": 0.2,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt, and of each KV head the tokens that these "
    "attend to most: as many as it has among the layer's best, `alpha` of the budget split evenly",
    formula="KV heads × (min(budget, prompt) + decoded tokens) in each layer",
    evicts="once, when the prompt is there; the first answer comes from the whole prompt",
    needs="attention of the last `window` queries, and attention over heads of different lengths",
    limits="heads are padded to the longest while a layer attends. Budgets of the heads are "
    "rounded together so that their sum is exact; the reference rounds each",
    headlines=(
        Headline(
            "better answers than SnapKV and PyramidKV at the same bytes",
            "13 tasks of RULER and 16 of LongBench, with and without the question in sight",
            "",
            "a direction, no figure: its paper claims no speed",
        ),
    ),
)

WHOLE_PROMPT = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt for the average head, and all that is decoded."""
    return evicted("ada-kv", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict, InputError for odd parameters."""
    check_evictable("ada-kv", layers)
    check_heads("ada-kv", parameters)


def check_heads(name: str, parameters: Mapping[str, Value]) -> None:
    """Raise InputError for parameters that say nothing sensible about windows and heads."""
    check_observing(name, parameters)
    alpha = parameters["alpha"]
    if isinstance(alpha, float) and alpha > 1:
        msg = f"{name}: alpha is a part of the budget, 1 at most, not {alpha}"
        raise InputError(msg)
