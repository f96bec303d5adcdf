"""How far a strategy's answers are from those of the full cache, step by step.

Both are fed the same tokens (teacher forcing), so that one early difference does not decide all
that follows. Logits are compared after every decode step; those after the prompt come before any
strategy has dropped or rounded what they attended to.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kvcalc.measure.feeds import Feed


def fidelity(logits: Tensor, full: Tensor, feed: Feed) -> dict[str, Any]:
    """Compare logits [steps + 1, batch, vocabulary] with those of the full cache.

    - `kl_mean`, `kl_max`: KL(full ‖ strategy) of a step, in nats;
    - `top1_agreement`: fraction of steps with the same most likely token;
    - `max_logit_difference`: the largest |Δ| of a logit;
    - `perplexity` of a text, and its ratio to that of the full cache, each with an interval, None
      for a single token; `perplexity_alike` says that the ratio's holds 1, so that nothing differs.
    """
    ours, theirs = logits[1:].double(), full[1:].double()
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found: dict[str, Any] = {
        "kl_mean": divergence.mean().clamp(min=0).item(),
        "kl_max": divergence.max().clamp(min=0).item(),
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "max_logit_difference": (ours - theirs).abs().max().item(),
    }
    if feed.is_text:
        surprise, full_surprise = _surprise(logits, feed), _surprise(full, feed)
        ratio, interval = _exponential_mean(surprise - full_surprise)
        found["perplexity"], found["perplexity_interval"] = _exponential_mean(surprise)
        found["perplexity_ratio"], found["perplexity_ratio_interval"] = ratio, interval
        found["perplexity_alike"] = interval is not None and interval[0] <= 1 <= interval[1]
    return found


def _exponential_mean(nats: Tensor) -> tuple[float, list[float] | None]:
    """Exp of the mean, and where it lies in 19 of 20 cases: the mean ± 1.96 standard errors, tokens
    taken as independent.
    """
    mean = nats.mean().item()
    if nats.numel() < 2:
        return math.exp(mean), None
    error = 1.96 * nats.std().item() / math.sqrt(nats.numel())
    return math.exp(mean), [math.exp(mean - error), math.exp(mean + error)]


def _surprise(logits: Tensor, feed: Feed) -> Tensor:
    """-log p in nats of each decode step's own token, predicted from what came before it."""
    targets = torch.cat(feed.steps, dim=1).T.cpu()
    predictions = logits[:-1].double().log_softmax(-1)
    return torch.gather(predictions, 2, targets[..., None]).flatten().neg()
