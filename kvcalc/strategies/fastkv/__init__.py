"""FastKV (arXiv:2502.01068): SnapKV, and from one layer on only part of the prompt is computed.

After the layer of token-selective propagation (TSP), hidden states of a share of the tokens go on:

    layers 0 to TSP     see the whole prompt, and keep `budget` of it
    layers after TSP    see `tsp_share` of it, and keep as many rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import EvictedLayer, check_evictable, evicted, sees_all
from kvcalc.strategies._parameters import Budget, Pooling, Value, percent

SUMMARY = "SnapKV, and later layers compute only the tokens that a middle layer chose"
SOURCE = "FastKV, arXiv:2502.01068; dongwonjo/FastKV (MIT)"
WORKS_ON = "models in which all layers are full attention or latent"
PARAMETERS: Mapping[str, Value] = {
    "budget": percent(10),
    "window": 8,
    "kernel": 7,
    "pooling": Pooling.MAX,
    "tsp_share": percent(20),
    "tsp_depth": 0.5,
}
ABOUT = About(
    keeps="the last `window` tokens of the prompt and the others that these attend to most; layers "
    "after the share `tsp_depth` of them choose among `tsp_share` of the tokens",
    formula="min(budget, prompt) + decoded tokens for each KV head",
    evicts="once, when the prompt is there; hidden states after the TSP layer",
    needs="attention of the last `window` queries; decoder layers whose inputs can be sliced",
    limits="tokens that the TSP layer does not choose are lost to all later layers; their first "
    "answer, too, comes from the chosen tokens",
    headlines=(
        Headline(
            "1.82× faster prefill",
            "Llama-3.1-8B, the most over contexts",
            "ttft",
            "half of the layers at 20% of the tokens: 1.67× in projections, 1.92× in attention",
        ),
        Headline("2.87× faster decoding", "Llama-3.1-8B, the most over contexts", "tpot"),
    ),
)

WHOLE_PROMPT = COMPOSES = ALTERS = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PropagatedLayer(EvictedLayer):
    """A layer of a model in which `passed` of the prompt is what later layers see."""

    passed: Budget

    def kept_of_prompt(self, prompt_tokens: int) -> int:
        """As many in every layer; InputError where later layers do not see that many."""
        kept = EvictedLayer.kept_of_prompt(self, prompt_tokens)
        if kept < prompt_tokens:
            check_passed(self.passed.of(prompt_tokens), budget_tokens=kept)
        return kept


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """A budget of the prompt, and all that is decoded."""
    return evicted(
        "fastkv",
        layer,
        parameters,
        grows=True,
        kind=PropagatedLayer,
        passed=parameters["tsp_share"],
    )


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with a layer that finds tokens by their place among those
    it was given, or sums them up.
    """
    tsp_place(cast("float", parameters["tsp_depth"]), len(layers))
    check_evictable("fastkv", layers)
    others = sorted({part.kind for layer in layers for part in layer.parts() if not sees_all(part)})
    if others:
        msg = (
            f"fastkv gives later layers part of the tokens, which layers of kind {others[0]} "
            "would take for the whole prompt; use snapkv"
        )
        raise UnsupportedError(msg)


def tsp_place(depth: float, places: int) -> int:
    """Which of `places` layers is the last to see the whole prompt: 15 of 32 at a depth of 0.5."""
    if not 0 < depth <= 1:
        msg = f"fastkv: tsp_depth must be above 0 and at most 1, not {depth:g}"
        raise InputError(msg)
    return max(int(depth * places + 0.5), 1) - 1


def check_passed(passed_tokens: int, *, budget_tokens: int) -> None:
    """Raise InputError where later layers see fewer tokens than every layer keeps."""
    if passed_tokens < budget_tokens:
        msg = (
            f"fastkv: tsp_share is {passed_tokens:,} tokens, fewer than the {budget_tokens:,} that "
            "every layer keeps; give a larger tsp_share or a smaller budget"
        )
        raise InputError(msg)
