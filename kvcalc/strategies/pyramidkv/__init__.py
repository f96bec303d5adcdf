"""PyramidKV (arXiv:2406.02069): what SnapKV keeps, more of it in early layers and less in late."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._apportion import apportion
from kvcalc.strategies._evicted import (
    BUDGET,
    WORKS_ON,
    EvictedLayer,
    check_evictable,
    check_observing,
    evicted,
    sees_all,
)
from kvcalc.strategies._parameters import Pooling, Value

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply_all", "check"]

SUMMARY = "snapkv with budgets that fall from the first layer to the last"
SOURCE = (
    "PyramidKV, arXiv:2406.02069, section 4; beta 20, window 8 and max pooling of 7 as in the "
    "LongBench runs of KVCache-Factory"
)
PARAMETERS: Mapping[str, Value] = {
    "budget": BUDGET,
    "window": 8,
    "kernel": 7,
    "pooling": Pooling.MAX,
    "beta": 20,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt and the others that these attend to most: "
    "1/`beta` of the budget beyond the window in the last layer, up to twice the budget in the "
    "first, along a line",
    formula="min(budget, prompt) + decoded tokens for each KV head, on average over the layers",
    evicts="once, when the prompt is there; the first answer comes from the whole prompt",
    needs="attention of the last `window` queries",
    limits="the same line for every prompt and model; where the first layer would want more than "
    "the prompt the line is flatter. Rounded so that the sum over the layers is exact, which the "
    "reference's is not",
    headlines=(
        Headline(
            "as good as the full cache with 12% of it",
            "LongBench (abstract)",
            "",
            "a mean over tasks",
        ),
        Headline(
            "up to 20.5 points above other methods",
            "TREC with 0.7% of the cache (abstract)",
            "",
            "accuracy of trained models in one task",
        ),
    ),
)

WHOLE_PROMPT = COMPOSES = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidLayer(EvictedLayer):
    """One step of the pyramid: the evicting layer `place` of `places`, counted from 0."""

    beta: int
    place: int
    places: int

    def kept_of_prompt(self, prompt_tokens: int) -> int:
        """The budget of its place."""
        average = EvictedLayer.kept_of_prompt(self, prompt_tokens)
        budgets = layer_budgets(
            average,
            window=self.window,
            beta=self.beta,
            places=self.places,
            prompt_tokens=prompt_tokens,
        )
        return budgets[self.place]

    def keeps(self) -> str:
        """With its place."""
        return f"{EvictedLayer.keeps(self)} on average, layer {self.place + 1} of {self.places}"


@lru_cache(maxsize=16)
def layer_budgets(
    budget: int, *, window: int, beta: int, places: int, prompt_tokens: int
) -> tuple[int, ...]:
    """Tokens of a prompt that each layer keeps, `budget` on average.

    Beyond the window it is a line: with a budget of 12, a window of 2 and beta 20, three layers of
    a long prompt keep 2 + [19.5, 10, 0.5]. Every layer asks for all of them, so the last few
    answers are kept.
    """
    if prompt_tokens <= budget:
        return (prompt_tokens,) * places
    before, average = prompt_tokens - window, budget - window
    most = min(2 * average - average / beta, before)
    least = 2 * average - most
    steps = max(places - 1, 1)
    line = [most - (most - least) * place / steps for place in range(places)]
    parts = apportion(line, places * average, [before] * places)
    return tuple(window + part for part in parts)


def apply_all(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> list[Layer]:
    """Each layer's budget of the prompt, and all that is decoded."""
    places = sum(sees_all(part) for layer in layers for part in layer.parts())
    place = count()

    def change(part: Layer) -> Layer:
        if not sees_all(part):
            return part
        return evicted(
            "pyramidkv",
            part,
            parameters,
            grows=True,
            kind=PyramidLayer,
            beta=parameters["beta"],
            place=next(place),
            places=places,
        )

    return [layer.each(change) for layer in layers]


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict, InputError for odd parameters."""
    check_evictable("pyramidkv", layers)
    check_observing("pyramidkv", parameters, beta=1)
