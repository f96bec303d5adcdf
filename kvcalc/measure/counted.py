"""The untimed run of a strategy: bytes held in each layer, peaks, and the logits of every step.

It is a run of its own, since tracing allocations slows it down.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcalc.measure.busy import busy_time
from kvcalc.measure.feeds import Feed
from kvcalc.measure.held import LayerBytes
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.peak import peak_memory
from kvcalc.measure.session import Session, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.sizing import SizeReport
from kvcalc.strategies import ChosenStrategy

WATCHED_STEPS = 4
"""Decode steps of which is noted how long the device works."""


class Counted(NamedTuple):
    """`fields` go into the row; `logits` [steps + 1, batch, vocabulary] in float32 on the CPU are
    those after the prompt and after each step.
    """

    fields: dict[str, Any]
    logits: Tensor


def count(
    loaded: LoadedModel,
    chosen: ChosenStrategy,
    workload: Workload,
    feed: Feed,
    predicted: SizeReport,
) -> Counted:
    """Run once and hold what each layer keeps after the last step against the prediction."""
    logits = []

    def keep(after: Tensor) -> None:
        # In numpy's memory, which the peak does not count: it is ours, not the strategy's.
        logits.append(after.float().cpu().numpy().copy())

    with undisturbed(loaded, chosen):
        with peak_memory(loaded.device) as prefill:
            session = Session(loaded, chosen, workload)
            after = session.prefill(feed.prompt)
        keep(after)
        after_prefill = sum(layer.held_bytes for layer in session.held())
        watched = feed.steps[-WATCHED_STEPS:]
        with peak_memory(loaded.device, level_bytes=prefill.left_bytes) as decode:
            for step in feed.steps[: -len(watched)]:
                after = session.decode(step)
                keep(after)
            with busy_time(loaded.device) as busy:
                for step in watched:
                    after = session.decode(step)
                    keep(after)
        held, observed = session.held(), session.observed()
        del session, after
    layers = compare(predicted, held)
    fields: dict[str, Any] = {
        "held_bytes": sum(layer.held_bytes for layer in held),
        "logical_bytes": sum(layer.logical_bytes for layer in held),
        "after_prefill_bytes": after_prefill,
        "prefill_peak_bytes": prefill.num_bytes,
        "decode_peak_bytes": decode.num_bytes,
        "peak_bytes": max(prefill.num_bytes, decode.num_bytes),
        "busy_seconds": None if busy.seconds is None else busy.seconds / len(watched),
        "layers": layers,
        "observed": observed,
    }
    verdict = _verdict(layers, pooled=chosen.layers_share)
    return Counted(fields | verdict, torch.from_numpy(np.stack(logits)))


def compare(predicted: SizeReport, held: Sequence[LayerBytes]) -> list[dict[str, int]]:
    """Per layer; a layer on one side only counts as 0 bytes on the other."""
    promised = [layer.bytes for layer in predicted.layers]
    most = max(len(promised), len(held))
    promised += [0] * (most - len(promised))
    found = [layer.held_bytes for layer in held] + [0] * (most - len(held))
    return [
        {"index": index, "predicted_bytes": promise, "held_bytes": fact}
        for index, (promise, fact) in enumerate(zip(promised, found, strict=True))
    ]


def _verdict(layers: Sequence[dict[str, int]], *, pooled: bool) -> dict[str, str]:
    """`mismatch` and where, if a prediction is broken; with `pooled` the sum is what is held
    against it.
    """
    if pooled:
        promised, found = (
            sum(layer[key] for layer in layers) for key in ("predicted_bytes", "held_bytes")
        )
        if promised == found:
            return {}
        reason = f"all layers hold other bytes than predicted: {promised:,} and {found:,} held"
        return {"status": "mismatch", "reason": reason}
    wrong = [layer for layer in layers if layer["predicted_bytes"] != layer["held_bytes"]]
    if not wrong:
        return {}
    first = wrong[0]
    return {
        "status": "mismatch",
        "reason": (
            f"{len(wrong)} of {len(layers)} layers hold other bytes than predicted; "
            f"layer {first['index']}: {first['predicted_bytes']:,} predicted, "
            f"{first['held_bytes']:,} held"
        ),
    }
