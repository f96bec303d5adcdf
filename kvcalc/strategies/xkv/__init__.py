"""XKV (arXiv:2412.05896, "personalized KV cache reduction"; not Cornell's xKV): layers share one
budget, each token going to the layer in which it saves most of the attention.
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

SUMMARY = "snapkv with one budget for all layers, spread by a first pass over the prompt"
SOURCE = "XKV, arXiv:2412.05896; CN-LWZ/XKV"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 8,
    "kernel": 7,
    "pooling": Pooling.AVG,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt and the others that these attend to most, the "
    "same number for each KV head of a layer; one more goes always to the layer whose next best "
    "is the largest part of its own sum of scores",
    formula="layers × min(budget, prompt) + layers × decoded tokens for each KV head, over all "
    "layers",
    evicts="once, when the prompt is there; the first answer comes from the whole prompt",
    needs="two passes over the prompt, the first for the scores of all layers; layers that keep "
    "rows of one shape",
    limits="the prompt is fed twice, so that the time to the first token doubles; the reference "
    "looks at a sample of a task's prompts once instead. A fixed total only, not a share of the "
    "attention to be saved. The cache must be filled by its own prefill",
    headlines=(
        Headline(
            "61.6% less KV cache on average",
            "Llama-3.1-8B-Instruct, 14 tasks of LongBench, at the same accuracy",
            "bytes",
            "follows from the budget that is asked for; the question is what it costs in quality",
        ),
        Headline("2.1× the compute efficiency", "the same runs", "tpot"),
        Headline(
            "up to 5.2× the throughput",
            "the same runs; the first version said 5.5×",
            "",
            "throughput of the larger batch that fits",
        ),
    ),
)

WHOLE_PROMPT = LAYERS_SHARE = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """The budget of the average layer, and all that is decoded."""
    return evicted("xkv", layer, parameters, grows=True, kind=SharingLayer)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict or layers that cannot share,
    InputError for odd parameters.
    """
    check_evictable("xkv", layers)
    check_alike("xkv", layers)
    check_observing("xkv", parameters)
