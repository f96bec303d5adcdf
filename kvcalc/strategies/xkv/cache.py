"""The running XKV cache; `prefill` feeds the prompt, twice."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kvcalc.errors import UnsupportedError
from kvcalc.strategies._evicted import check_window
from kvcalc.strategies._evicting_cache import (
    Attended,
    EvictingStorage,
    attending,
    evicting_cache,
)
from kvcalc.strategies._ragged_cache import RaggedEviction, best_counts, observed
from kvcalc.strategies._running import feed
from kvcalc.strategies._scores import pooled, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel

__all__ = ["attending", "build", "observed", "prefill"]

Evicting = TypeVar("Evicting", bound=EvictingStorage)

SMALLEST = 1e-30
"""What the scores of a layer sum up to at least, so that they can be divided by it."""


class XKVStorage(RaggedEviction):
    """The plan holds `budgets`: for each sequence the tokens of each layer before the window."""

    kernel: int
    pooling: str

    def evict(self, seen: Attended) -> None:
        """The window, and as many of the best as the layer was given."""
        if "budgets" not in self.plan:
            msg = (
                "xkv spreads its budget after a first pass over the prompt: feed the prompt by "
                "kvcalc.strategies.xkv.cache.prefill(model, cache, prompt)"
            )
            raise UnsupportedError(msg)
        budgets = [layers[self.place] for layers in self.plan["budgets"]]
        scores = _scores(seen, self)
        self.keep_best(scores, [[budget] * self.kv_heads for budget in budgets])

    def reset(self) -> None:
        """Back to empty; another prompt is another plan."""
        super().reset()
        self.plan.clear()


class XKVScores(EvictingStorage):
    """The first pass: rows are attended to and let go.

    The plan takes of each layer its `gains` [batch, tokens before the window]: what the best token
    of each head adds, all heads together, then the second best, as parts of the layer's sum.
    """

    kernel: int
    pooling: str

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return keys, values

    def attended(self, seen: Attended) -> None:
        """Note what this layer would gain by each token."""
        gains = _scores(seen, self).sort(-1, descending=True).values.sum(1)
        total = gains.sum(-1, keepdim=True).clamp_min(SMALLEST)
        self.plan.setdefault("gains", []).append(gains / total)


def _scores(seen: Attended, layer: XKVStorage | XKVScores) -> Tensor:
    """As SnapKV's: the sum of the window's attention, pooled."""
    attention = window_attention(seen, layer.window_tokens)[..., : -layer.window_tokens]
    return pooled(attention.sum(2), layer.kernel, layer.pooling)


def prefill(model: "PreTrainedModel", cache: "Cache", prompt: Tensor) -> Tensor:
    """Feed a prompt [batch, tokens]; returns the logits [batch, vocabulary] after it.

    One budget is spread greedily: each token goes to the layer that gains most by it. Gains of a
    layer only fall, so this takes the largest gains of all layers.
    """
    first = _first(cache, XKVStorage)
    if prompt.shape[1] > first.budget:
        window = first.window_tokens
        check_window("xkv", budget_tokens=first.budget, window=window)
        settings = {"window": window, "kernel": first.kernel, "pooling": first.pooling}
        scored = evicting_cache(model.config, XKVScores, settings)
        feed(model, scored, prompt)
        gains = torch.stack(_first(scored, XKVScores).plan["gains"], dim=1)
        del scored
        first.plan["budgets"] = best_counts(gains, first.places * (first.budget - window))
    return feed(model, cache, prompt)


def _first(cache: "Cache", kind: type[Evicting]) -> Evicting:
    """Of the layers that are of this kind."""
    return next(layer for layer in cache.layers if isinstance(layer, kind))


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, XKVStorage, parameters)
