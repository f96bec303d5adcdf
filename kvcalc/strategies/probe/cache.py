"""The running cache of the probe."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import (
    Attended,
    PromptEviction,
    RowsKind,
    attending,
    evicting_cache,
)
from kvcalc.strategies._scores import best_and_last, column_sums

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build", "observed"]

HELD_OUT = 4
"""One in this many calibration tokens is not fitted to, and says how well the probe does."""

RIDGE = 1e-3
"""Of the mean variance of a feature."""


class ProbeStorage(PromptEviction):
    """A regression for each KV head of each sequence."""

    calibration: float
    correlation: float | None = None

    def choose(self, seen: Attended) -> Tensor:
        """The best by the probe before the window, and the window."""
        keys = self.prompt_keys.float()
        tokens = max(int(self.calibration * keys.shape[2]), 2 * HELD_OUT)
        features = torch.cat([keys, torch.ones_like(keys[..., :1])], dim=3)
        attention = _mean_attention(seen, min(tokens, keys.shape[2]))
        fitted_to = features[:, :, : attention.shape[2]]
        out = torch.arange(attention.shape[2], device=keys.device) % HELD_OUT == HELD_OUT - 1
        weights = ridge(fitted_to[:, :, ~out], attention[:, :, ~out])
        guess = (fitted_to[:, :, out] @ weights[..., None])[..., 0]
        self.correlation = _correlation(guess, attention[:, :, out])
        scores = (features @ weights[..., None])[..., 0]
        return best_and_last(scores[..., : -self.window_tokens], self.budget, self.window_tokens)


def ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Weights [..., features] of least squares from features [..., tokens, features] to targets
    [..., tokens], each head for itself.
    """
    products = features.transpose(-1, -2) @ features
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    products = products + torch.diag_embed(RIDGE * diagonal.mean(-1, keepdim=True) + 0 * diagonal)
    return torch.linalg.solve(products, features.transpose(-1, -2) @ targets[..., None])[..., 0]


def _mean_attention(seen: Attended, tokens: int) -> Tensor:
    """Log of what each of the first tokens got on average from the queries among them that see it,
    [batch, KV heads, tokens].
    """
    start = seen._replace(
        query=seen.query[:, :, :tokens],
        key=seen.key[:, :, :tokens],
        value=seen.value[:, :, :tokens],
    )
    sums = column_sums(start)
    queries = torch.arange(tokens, 0, -1, device=sums.device)
    return (sums / queries).clamp(min=1e-12).log()


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's over the tokens, averaged over heads; 0 where either does not vary."""
    one, other = (values - values.mean(-1, keepdim=True) for values in (one, other))
    norms = one.norm(dim=-1) * other.norm(dim=-1)
    return float(((one * other).sum(-1) / norms.clamp(min=1e-12)).mean())


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return evicting_cache(config, ProbeStorage, parameters, rows=rows)


def observed(cache: "Cache") -> dict[str, float]:
    """How the probe's scores go with attention on tokens it was not fitted to, over the layers."""
    found = [
        layer.correlation
        for layer in cache.layers
        if isinstance(layer, ProbeStorage) and layer.correlation is not None
    ]
    if not found:
        return {}
    return {"correlation_mean": sum(found) / len(found), "correlation_least": min(found)}
