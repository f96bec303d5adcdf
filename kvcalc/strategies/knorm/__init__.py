"""Key norms (arXiv:2406.11430): keys of small norm are what queries attend to."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of a prompt, the keys with the smallest L2 norm, for each KV head"
SOURCE = "Devoto et al., arXiv:2406.11430; alessiodevoto/l2compress"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET}
ABOUT = About(
    keeps="tokens whose keys are shortest",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there",
    needs="keys only: no queries, no attention",
    limits="says little where a model normalises its keys (Qwen3, Gemma 3); every layer is "
    "thinned, while the authors' examples leave the first two whole",
    headlines=(
        Headline(
            "50% less with no loss",
            "language modelling and needle in a haystack",
            "",
            "the authors' scripts leave some layers whole",
        ),
        Headline("90% less with no loss", "passkey retrieval", "", "points of a benchmark"),
    ),
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("knorm", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("knorm", layers)
