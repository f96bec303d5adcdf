"""StreamingLLM (arXiv:2309.17453): the first tokens, which attention leans on, and the last."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NoReturn

from kvcalc.errors import UnsupportedError
from kvcalc.layers import LatentAttention, Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import BUDGET, WORKS_ON, check_evictable, evicted
from kvcalc.strategies._parameters import Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "Positions", "apply", "check"]


class Positions(StrEnum):
    """Where tokens stand: at their place in the cache, or where they were in the text."""

    CACHE = "cache"
    ORIGINAL = "original"


SUMMARY = "a few first tokens and the last ones, at every step"
SOURCE = "StreamingLLM, arXiv:2309.17453, section 3.2; mit-han-lab/streaming-llm"
PARAMETERS: Mapping[str, Value] = {"budget": BUDGET, "sinks": 4, "positions": Positions.CACHE}
ABOUT = About(
    keeps="the first `sinks` tokens, and the last ones with the rest of the budget",
    formula="min(budget, tokens) for each KV head",
    evicts="after the prompt, and at every step after it",
    needs="nothing; with `positions=cache` the rotation of the model's keys, which is known for "
    "Llama, Mistral, Qwen2, Qwen3, Phi-3 and Gemma 3",
    limits="all between is lost: it goes on without an end, but remembers no more than a window",
    headlines=(
        Headline(
            "up to 22.2× faster",
            "per token, against a sliding window that is computed again at each step",
            "",
            "that baseline keeps no cache; a dynamic cache is faster than it, too",
        ),
        Headline(
            "stable over 4 million tokens",
            "Llama-2, MPT, Falcon and Pythia, perplexity",
            "",
            "fluency, and no memory of what was dropped",
        ),
    ),
)

WHOLE_PROMPT = True
ALTERS = True


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A fixed number of rows."""
    return evicted("sink-window", layer, parameters, grows=False)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict, or whose keys cannot be moved."""
    check_evictable("sink-window", layers)
    latent = any(isinstance(part, LatentAttention) for layer in layers for part in layer.parts())
    if latent and parameters["positions"] == Positions.CACHE:
        refuse_moving("latents")


def refuse_moving(what: str) -> NoReturn:
    """Raise UnsupportedError where keys cannot be moved to their place in the cache."""
    msg = f"sink-window moves no keys of {what}; use sink-window:positions=original"
    raise UnsupportedError(msg)
