"""Tokens drawn at random: the floor that any method must be above."""

from collections.abc import Mapping, Sequence

from kvcalc.layers import Layer
from kvcalc.strategies._about import About
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "of a prompt, tokens drawn at random for each KV head: the floor"
SOURCE = "no paper: a baseline, as kvpress has one"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "seed": 0}
ABOUT = About(
    keeps="tokens drawn without looking, the last one among them",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there",
    needs="nothing",
    limits="a baseline: what chooses no better than this chooses nothing",
)

WHOLE_PROMPT = COMPOSES = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted("random", layer, parameters, grows=True)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict."""
    del parameters
    check_evictable("random", layers)
