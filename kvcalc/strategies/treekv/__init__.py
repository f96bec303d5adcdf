"""TreeKV (arXiv:2501.04987): of two neighbours the weaker goes, in turn from old to new, so that
what is kept is sparse long ago and dense lately.
"""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "first and last tokens, and between them ever fewer the longer ago"
SOURCE = "TreeKV, arXiv:2501.04987, section 4 (algorithm 1) and 5.2 (shares of the budget)"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "sinks": 4}
ABOUT = About(
    keeps="half the budget is a tree, the other half the first `sinks` tokens and the last ones; "
    "one more token in the tree, and the next pair of neighbours in it loses the one with less "
    "attention on average",
    formula="min(budget, tokens) for each KV head, each with a float32 sum and an int32 count",
    evicts="after the prompt, and at every step after it",
    needs="attention of the last 32 queries of a prompt, and of each later one",
    limits="a prompt is thinned token by token, where the paper takes blocks of a size it does not "
    "give; tokens keep their own positions, where the paper closes the gaps",
    headlines=(
        Headline(
            "16× smaller cache",
            "1,024 of 16k tokens, Llama-2-7B on PG19 and OpenWebText2",
            "bytes",
            "a ratio of budgets, which the cache's bytes follow",
        ),
        Headline(
            "LongBench 31.70 against 32.86 of the full cache",
            "2,048 tokens kept, Llama-3.2-1B-Instruct",
            "",
            "points of a benchmark",
        ),
    ),
)

WHOLE_PROMPT = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A fixed number of rows, each with a sum and a count."""
    return evicted("treekv", layer, parameters, grows=False, scores=2)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("treekv", layers)
