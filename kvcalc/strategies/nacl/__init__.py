"""NACL (ACL 2024): the end of a prompt chooses most of what is kept of it, and chance the rest."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value, percent

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of a prompt, what its last 1% attends to, and some at random, for each KV head"
SOURCE = "NACL, ACL 2024 (2024.acl-long.428); PaddlePaddle/Research, NLP/ACL2024-NACL"
PARAMETERS: Mapping[str, Value] = {"budget": percent(20), "sinks": 256, "seed": 0}
ABOUT = About(
    keeps="of 20 parts of the budget 12 that the last 1% of the prompt attends to most, 7 drawn "
    "from the rest by the same scores, 1 of first and last tokens; `sinks` of these are the first, "
    "half of them at most",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there, whatever its length (the authors' code: above 2,048)",
    needs="attention of the last 1% of the queries to the whole prompt, later tokens included",
    limits="what is drawn is luck; the authors' own run loses key-value retrieval (0.59 to 0.04)",
    headlines=(
        Headline(
            "up to 5× smaller cache",
            "128k tokens, 80% evicted; Llama-3.1-8B, InfiniteBench",
            "bytes",
            "a ratio of budgets, which the cache's bytes follow",
        ),
    ),
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("nacl", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("nacl", layers)
