"""KeyDiff (arXiv:2504.15364): keys that are unlike the others are what queries attend to."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of a prompt, the keys least like their mean, for each KV head"
SOURCE = "KeyDiff, arXiv:2504.15364"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET}
ABOUT = About(
    keeps="tokens whose keys have the smallest cosine with the mean of all keys' directions",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there; the paper evicts block by block, so that a prompt is "
    "never held whole",
    needs="keys only: no queries, no attention",
    limits="what is asked plays no part, nor do values",
    headlines=(
        Headline(
            "less than 0.04% behind the full cache",
            "LongBench with 8k tokens kept, about 23% less; Llama-3.1-8B and Llama-3.2-3B",
            "",
            "points of a benchmark",
        ),
        Headline(
            "up to 30% lower latency",
            "a whole answer, against other methods that evict block by block",
            "",
            "most of it is the attention that the others compute for their scores",
        ),
    ),
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("keydiff", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("keydiff", layers)
