"""LagKV (arXiv:2504.04704): what of a prompt is unlike the tokens that follow it is kept."""

from collections.abc import Mapping, Sequence

from kvcalc.errors import InputError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of each part of a prompt, the K and V most uneven against the next part's range"
SOURCE = "LagKV, arXiv:2504.04704; AI-Lab-China-Merchants-Bank/LagKV, with the lag of its example"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "sinks": 16, "lag": 128}
ABOUT = About(
    keeps="the first `sinks` tokens; of each `lag` tokens after them those whose K and V, scaled "
    "by least and greatest of the next `lag`, deviate most over the channels; the last whole `lag` "
    "and what remains; score, sinks and tail are as in the authors' code",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there; the authors' cache goes on while it decodes, as often "
    "as two more parts are there",
    needs="keys and values only: no queries, no attention",
    limits="what is asked plays no part. The authors keep a ratio of each part; here the parts "
    "share the budget evenly, later ones take what is left over, and `lag` is at most a third of "
    "what the sinks leave of the budget, so that every budget is kept exactly. A channel that is "
    "constant in the next part is not scaled (the authors divide by zero). Of the paper only the "
    "abstract and a review of its formulas were read",
    headlines=(
        Headline(
            "nearly no loss at 2×, about 90% of the full cache's result at 8×",
            "LongBench and passkey retrieval (the paper's first version)",
            "",
            "points of a benchmark",
        ),
        Headline(
            "over 50% better than H2O",
            "retrieval of a passkey of 64 digits, at the same ratio (first version: over 60%)",
            "",
            "points of a benchmark",
        ),
    ),
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("lagkv", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict, InputError for parts of nothing."""
    if parameters["lag"] == 0:
        msg = "lagkv: lag must be at least 1, not 0"
        raise InputError(msg)
    check_evictable("lagkv", layers)
