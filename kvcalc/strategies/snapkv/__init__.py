"""SnapKV (arXiv:2404.14469): what the last tokens of a prompt attend to is what is kept of it."""

from collections.abc import Mapping, Sequence

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


SUMMARY = "of a prompt, what its last tokens attend to, for each KV head"
SOURCE = "SnapKV, arXiv:2404.14469, section 4; window 32 and max pooling as in its LongBench runs"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 32,
    "kernel": 7,
    "pooling": Pooling.MAX,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt and the others that these attend to most",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there; the first answer comes from the whole prompt",
    needs="attention of the last `window` queries",
    limits="what the end of the prompt does not ask for is lost: a question that comes later may "
    "find nothing",
    headlines=(
        Headline(
            "8.2× less memory",
            "16k tokens",
            "bytes",
            "a ratio of budgets, which the cache's bytes follow",
        ),
        Headline("3.6× faster generation", "16k tokens", "tpot"),
    ),
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("snapkv", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict; InputError for an empty window and
    an even kernel.
    """
    check_observing("snapkv", parameters)
    check_evictable("snapkv", layers)
