"""Timed runs of a strategy: TTFT is one prefill, TPOT a decode step at the stated depth.

The first decode step is timed apart: it pays for lazy allocation and for windows that collapse.
On CUDA events are recorded and the device is synchronised once, after the last step; on the CPU
the clock is read. Several runs are summed up by median and interquartile range.
"""

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kvcalc.measure.feeds import Feed
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.session import Session, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.strategies import ChosenStrategy


class Run(NamedTuple):
    """Seconds of one run: the prefill, and each decode step in order; `mode` is how decode steps
    were run.
    """

    prefill_seconds: float
    step_seconds: list[float]
    mode: str = "eager"


class Clock:
    """Marks in the stream of work on a device, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        """After all that was launched so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [one.elapsed_time(other) / 1e3 for one, other in pairwise(self._marks)]
        return [(other - one) / 1e9 for one, other in pairwise(self._marks)]


def time_once(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload, feed: Feed) -> Run:
    """One run from an empty cache."""
    with undisturbed(loaded, chosen) as calls:
        session = Session(loaded, chosen, workload)
        clock = Clock(loaded.device)
        clock.mark()
        logits = session.prefill(feed.prompt)
        clock.mark()
        session.prepare_decode(logits)
        clock.mark()
        for step in feed.steps:
            session.decode(step)
            clock.mark()
        prefill, _, *steps = clock.seconds()
        mode = session.mode + ", fused attention" * bool(calls["fused"])
    return Run(prefill, steps, mode)


def summed_up(runs: Sequence[Run], *, batch: int) -> dict[str, Any]:
    """TTFT, the first step and TPOT over all runs.

    TPOT is the median step of a run, without its first where there are more; `p90` and `max` are
    over the steps of all runs.
    """
    later = [run.step_seconds[1:] or run.step_seconds for run in runs]
    tpot = _summary([statistics.median(steps) for steps in later])
    every = sorted(seconds for steps in later for seconds in steps)
    tpot |= {"p90": every[min(len(every) - 1, len(every) * 9 // 10)], "max": every[-1]}
    return {
        "ttft_seconds": _summary([run.prefill_seconds for run in runs]),
        "first_decode_seconds": _summary([run.step_seconds[0] for run in runs]),
        "tpot_seconds": tpot,
        "tokens_per_second": batch / tpot["median"],
        "decode_mode": runs[-1].mode,
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, and as spread the interquartile range."""
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "spread": quartiles[2] - quartiles[0],
        "min": min(values),
        "max": max(values),
        "runs": list(values),
    }
