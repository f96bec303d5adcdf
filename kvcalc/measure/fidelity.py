"""How far a strategy's answers are from those of the full cache, step by step.

Both are fed the same tokens (teacher forcing), so that one early difference does not decide all
that follows. Logits are compared after every decode step; those after the prompt come before any
strategy has dropped or rounded what they attended to.
"""

from typing import Any

import torch
from torch import Tensor

from kvcalc.measure.feeds import Feed


def fidelity(logits: Tensor, full: Tensor, feed: Feed) -> dict[str, Any]:
    """Compare logits [steps + 1, batch, vocabulary] with those of the full cache.

    - `kl_mean`, `kl_max`: KL(full ‖ strategy) of a step, in nats;
    - `top1_agreement`: fraction of steps with the same most likely token;
    - `max_logit_difference`: the largest |Δ| of a logit;
    - `perplexity` of a text, and its ratio to that of the full cache.
    """
    ours, theirs = logits[1:].double(), full[1:].double()
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found = {
        "kl_mean": divergence.mean().clamp(min=0).item(),
        "kl_max": divergence.max().clamp(min=0).item(),
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "max_logit_difference": (ours - theirs).abs().max().item(),
    }
    if feed.is_text:
        found["perplexity"] = _perplexity(logits, feed)
        found["perplexity_ratio"] = found["perplexity"] / _perplexity(full, feed)
    return found


def _perplexity(logits: Tensor, feed: Feed) -> float:
    """Perplexity of the decode steps' own tokens: each is predicted from what came before it."""
    targets = torch.cat(feed.steps, dim=1).T.cpu()
    predictions = logits[:-1].double().log_softmax(-1)
    return torch.gather(predictions, 2, targets[..., None]).mean().neg().exp().item()
