"""EpiCache (arXiv:2509.17396): a long conversation in episodes, each with a cache of its own that
never grows beyond a bound.

The prompt is fed once for each episode, a block at a time. After each block the model reads a
typical stretch of the episode, and the rows that it attends to most are kept. A question is
answered from the cache of the episode that it is nearest to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import UnsupportedError
from kvcalc.layers import Layer
from kvcalc.layers.mixed import NoCache
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import (
    BUDGET,
    EvictedLayer,
    check_evictable,
    check_window,
    evicted,
    sees_all,
)
from kvcalc.strategies._parameters import Value

SUMMARY = "episodes of a prompt, each with a cache under a bound that blocks of the prompt fill"
SOURCE = "EpiCache, arXiv:2509.17396, section 3"
WORKS_ON = "models of full-attention and latent layers alone"
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "chunk": 2048,
    "episodes": 4,
    "segment": 64,
    "sinks": 4,
}
ABOUT = About(
    keeps="for each of `episodes` clusters of the prompt's segments, the first `sinks` tokens and "
    "those that a typical segment of the cluster attends to most",
    formula="episodes × budget + decoded tokens for each KV head; the whole prompt where it is not "
    "above the budget",
    evicts="after each block of `chunk` tokens of the prompt",
    needs="a pass over the prompt for each episode, and one over `segment` tokens after each block",
    limits="segments are compared by the mean of the model's own input embeddings, which stands in "
    "for the sentence encoder of the paper; budgets of layers are even, which the paper sets by "
    "profiling each model; only the cache of one episode need be on the device at a time",
    headlines=(
        Headline(
            "4–6× compression",
            "LongMemEval, Realtalk and LoCoMo, for the cache of one episode",
            "",
            "all episodes together hold `episodes` times as much",
        ),
        Headline(
            "up to 30% better accuracy",
            "LongMemEval, Realtalk and LoCoMo, at the same budget (v4)",
            "",
            "against other methods, not against the full cache",
        ),
        Headline("up to 2.4× lower latency", "LongMemEval, Realtalk and LoCoMo", "tpot"),
        Headline("up to 3.7× lower peak memory", "v4; v1 to v3 say 3.5×", "peak"),
    ),
)

WHOLE_PROMPT = True
ALTERS = True
"""Blocks of the prompt see what was kept of those before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodesLayer(EvictedLayer):
    """As many rows for each episode."""

    episodes: int

    def kept_of_prompt(self, prompt_tokens: int) -> int:
        """Those of all episodes, or the whole prompt once."""
        budget_tokens = self.budget.of(prompt_tokens)
        if prompt_tokens <= budget_tokens:
            return prompt_tokens
        check_window(self.name, budget_tokens=budget_tokens, window=self.window)
        return self.episodes * budget_tokens


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget for each episode, and all that is decoded; the sinks must leave room in it."""
    episodes, sinks = parameters["episodes"], parameters["sinks"]
    own = {**parameters, "window": sinks}
    return evicted("epicache", layer, own, grows=True, kind=EpisodesLayer, episodes=episodes)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with other layers, since each episode starts anew."""
    check_evictable("epicache", layers)
    for part in (part for layer in layers for part in layer.parts()):
        if not sees_all(part) and not isinstance(part, NoCache):
            msg = f"epicache does not cover layers of kind {part.kind}: it feeds prompts repeatedly"
            raise UnsupportedError(msg)
    for name in ("chunk", "episodes", "segment"):
        if parameters[name] == 0:
            msg = f"epicache: {name} must be at least 1"
            raise UnsupportedError(msg)


def figures(
    layers: Sequence[Layer],
    parameters: Mapping[str, Value],
    *,
    tokens: int,
    batch: int,
    dtype: StorageFormat,
) -> dict[str, int]:
    """What the cache of one episode takes, if the others are elsewhere."""
    one = dict(parameters) | {"episodes": 1}
    active = 0
    for layer in layers:
        held = layer.each(lambda part: apply(part, one))
        active += held.num_bytes(tokens=tokens, batch=batch, dtype=dtype)
    return {"active_bytes": active}
