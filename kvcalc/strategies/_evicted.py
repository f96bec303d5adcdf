"""What promises of evicting strategies share: layers that keep the rows of some tokens only.

Which tokens is decided while the model runs; how many is known beforehand. Evicted are tokens of
layers that see all. A window already drops tokens by position and stays as the model has it, as
states do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeGuard

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import FullAttention, LatentAttention, Layer, PlainLayer, Setting, Windowed
from kvcalc.layers.mixed import NoCache
from kvcalc.layers.states import StateLayer
from kvcalc.strategies._parameters import Budget, percent
from kvcalc.strategies._rows import refuse_own_classes

WORKS_ON = "full-attention and latent layers; windows and states stay as they are"

BUDGET = percent(12.5)
"""What is kept where a paper leaves the budget to the user."""

SCORE_BYTES = 4
"""A float32 beside each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictedLayer(PlainLayer):
    """Rows of at most `budget` tokens of a prompt.

    The last `window` tokens of it are always kept. With `grows` the tokens that are decoded later
    stay, too; else they share the budget with those of the prompt. `stored` says how the rows are
    kept, `scores` how many float32 numbers stand beside each of them, for each KV head.
    `prompt_tokens` is None until it is bound.
    """

    name: str
    layer: FullAttention | LatentAttention
    stored: Layer
    budget: Budget
    window: int
    grows: bool
    scores: int
    prompt_tokens: int | None = None

    @property
    def kind(self) -> str:
        """`evicted_full_attention`."""
        return f"evicted_{self.stored.kind}"

    def bind(self, setting: Setting) -> Self:
        """With the length of the prompt."""
        return replace(self, prompt_tokens=setting.prompt_tokens)

    def kept_of_prompt(self, prompt_tokens: int) -> int:
        """Tokens that are kept of a prompt, for each KV head (on average, where heads differ).

        Raises InputError where something must be dropped and the window alone fills the budget.
        """
        budget_tokens = self.budget.of(prompt_tokens)
        if budget_tokens < prompt_tokens:
            check_window(self.name, budget_tokens=budget_tokens, window=self.window)
        return min(prompt_tokens, budget_tokens)

    def tokens_kept(self, tokens: int) -> int:
        """Tokens whose rows are in the cache when `tokens` have come."""
        prompt, decoded = self._split(tokens)
        kept = self.kept_of_prompt(prompt)
        return kept + decoded if self.grows else min(tokens, self.budget.of(prompt))

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Rows of the tokens kept, and their scores."""
        kept = self.tokens_kept(tokens)
        rows = self.stored.num_bytes(tokens=kept, batch=batch, dtype=dtype)
        return rows + batch * self.layer.rows().kv_heads * kept * self.scores * SCORE_BYTES

    def breakpoints(self) -> tuple[int, ...] | None:
        """Where the prompt ends decides, so that one length alone says nothing."""
        return None

    def shard(self, tp: int) -> Self:
        """Each head chooses for itself, so each rank keeps its heads' part."""
        return replace(self, layer=self.layer.shard(tp), stored=self.stored.shard(tp))

    def keeps(self) -> str:
        """As it is stored, and the budget."""
        return f"{self.stored.keeps()}, budget {self.budget}"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The rows, and which they are."""
        prompt, decoded = self._split(tokens)
        kept = self.tokens_kept(tokens)
        rows = self.stored.formula(tokens=kept, dtype=dtype)
        heads = self.layer.rows().kv_heads
        scores = f" + {heads} × {kept:,} × {self.scores} float32 scores" if self.scores else ""
        return f"{rows}{scores}, of a prompt of {prompt:,} and {decoded:,} decoded"

    def _split(self, tokens: int) -> tuple[int, int]:
        prompt = tokens if self.prompt_tokens is None else min(self.prompt_tokens, tokens)
        return prompt, tokens - prompt


class SharingLayer(EvictedLayer):
    """One of the layers that share a budget as the prompt says: what it says of itself is what they
    keep on average, and their sum is exact.
    """

    __slots__ = ()

    def keeps(self) -> str:
        """With that said."""
        return f"{EvictedLayer.keeps(self)} on average"


def evicted(
    name: str,
    layer: Layer,
    parameters: Mapping[str, Any],
    *,
    grows: bool,
    scores: int = 0,
    kind: type[EvictedLayer] = EvictedLayer,
    **fields: Any,  # noqa: ANN401 - of the kind
) -> Layer:
    """A layer that sees all with its budget, any other as it is."""
    if not sees_all(layer):
        return layer
    return kind(
        name=name,
        layer=layer,
        stored=layer,
        budget=parameters["budget"],
        window=parameters.get("window", 0),
        grows=grows,
        scores=scores,
        **fields,
    )


def sees_all(layer: Layer) -> TypeGuard[FullAttention | LatentAttention]:
    """Whether a part of a layer is one whose tokens can be evicted."""
    return isinstance(layer, FullAttention | LatentAttention) and not isinstance(layer, Windowed)


def check_evictable(name: str, layers: Sequence[Layer]) -> None:
    """Raise UnsupportedError for a model of which this strategy could evict nothing, or which keeps
    tokens in a way that it cannot follow.
    """
    refuse_own_classes(layers, name)
    parts = [part for layer in layers for part in layer.parts()]
    for part in parts:
        if isinstance(part, NoCache) and "shares" in part.reason:
            msg = f"{name} does not cover layers that attend to another layer's K and V"
            raise UnsupportedError(msg)
        if not (sees_all(part) or isinstance(part, Windowed | StateLayer | NoCache)):
            msg = f"{name} does not cover layers of kind {part.kind}"
            raise UnsupportedError(msg)
    if not any(map(sees_all, parts)):
        msg = (
            f"{name} has nothing to evict from: no layer attends to all tokens; use dynamic; "
            "deciding field: sliding_window"
        )
        raise UnsupportedError(msg)


def check_window(name: str, *, budget_tokens: int, window: int) -> None:
    """Raise InputError where a budget does not hold the window of last tokens, and one more."""
    if budget_tokens <= window:
        msg = (
            f"{name}: a budget of {budget_tokens:,} tokens does not hold its window of the last "
            f"{window:,} and a token more; give a larger budget or a smaller window"
        )
        raise InputError(msg)


def check_alike(name: str, layers: Sequence[Layer]) -> None:
    """Raise UnsupportedError where layers that share a budget keep rows of different shapes: a
    token would then weigh more in one layer than in another, and the prompt decide over the bytes.
    """
    shapes = {part.rows() for layer in layers for part in layer.parts() if sees_all(part)}
    if len(shapes) > 1:
        heads, widths = (sorted(set(values)) for values in list(zip(*shapes, strict=True))[:2])
        msg = (
            f"{name} spreads one budget over the layers, which must keep rows of one shape; here "
            f"KV heads are {heads} and key widths {widths}"
        )
        raise UnsupportedError(msg)


def check_observing(name: str, parameters: Mapping[str, Any], **least: int) -> None:
    """Raise InputError where the window of queries is empty, the kernel that pools their attention
    has no middle, or another parameter is below what it must `least` be.
    """
    for key, value in {"window": 1, **least}.items():
        if parameters[key] < value:
            msg = f"{name}: {key} must be at least {value}, not {parameters[key]}"
            raise InputError(msg)
    if parameters["kernel"] % 2 == 0:
        msg = f"{name}: kernel must be odd, not {parameters['kernel']}"
        raise InputError(msg)
