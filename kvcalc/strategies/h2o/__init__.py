"""H2O (arXiv:2306.14048): tokens that all queries together attended to most, and the last ones."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "heavy hitters: what all queries so far attended to most, and as many of the last tokens"
SOURCE = "H2O, arXiv:2306.14048, section 4 (algorithm 1); FMInference/H2O"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "recent_share": 0.5}
ABOUT = About(
    keeps="for each KV head the last `recent_share` of the budget, and before them the tokens with "
    "the largest sum of attention over all queries so far",
    formula="min(budget, tokens) for each KV head, each with a float32 sum",
    evicts="after the prompt, and at every step after it",
    needs="attention of every query, computed again in blocks of 256 queries",
    limits="sums favour early tokens, which more queries have seen",
    headlines=(
        Headline(
            "up to 29× the throughput",
            "OPT-6.7B and 30B with 20% of the cache, against DeepSpeed and Accelerate",
            "",
            "serving throughput with larger batches, against systems that offload",
        ),
        Headline("up to 1.9× lower latency", "OPT, equal batch", "tpot"),
    ),
)

WHOLE_PROMPT = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A fixed number of rows with their sums."""
    return evicted("h2o", layer, parameters, grows=False, scores=1)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("h2o", layers)
