"""Timed runs of a strategy: TTFT is one prefill, TPOT a decode step at the stated depth.

The first decode step is timed apart: it pays for lazy allocation and for windows that collapse.
On CUDA events are recorded, and the device is waited for after the prefill, so that no strategy
hides launches of its first step behind it, and after the last step; on the CPU the clock is read.
Several runs are summed up by median and interquartile range.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kvcalc.measure import nvml
from kvcalc.measure.feeds import Feed
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.session import Session, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.strategies import ChosenStrategy

SHORTEST_ENERGY_SECONDS = 0.5
"""NVML renews its energy counter some ten to fifty times a second: what is shorter says little."""


class Run(NamedTuple):
    """Seconds of one run: the prefill, and each decode step in order; `mode` is how decode steps
    were run, `state` what NVML said of the GPU while the prefill ran, `joules` what a decoded token
    took, None where the steps were too short or nobody counts, `attention` how many calls of
    attention each kernel answered, where they are counted.
    """

    prefill_seconds: float
    step_seconds: list[float]
    mode: str = "eager"
    state: Mapping[str, Any] = {}
    joules: float | None = None
    attention: Mapping[str, int] = {}


class Meter:
    """The energy of a stretch of work, which must have waited for its device at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._start_ns = nvml.energy_joules(device), time.perf_counter_ns()

    def wants_more(self) -> bool:
        """Whether more of the same work would make a figure of it."""
        lasted = (time.perf_counter_ns() - self._start_ns) / 1e9
        return self._start is not None and lasted < SHORTEST_ENERGY_SECONDS

    def joules(self) -> float | None:
        """Since the start; None where nobody counts, or it was too short."""
        end = nvml.energy_joules(self._device)
        if self._start is None or end is None or self.wants_more():
            return None
        return end - self._start


class Clock:
    """Marks in the stream of work on a device, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.wait()

    def mark(self) -> None:
        """After all that was launched so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the device."""
        self.wait()
        if self._device.type == "cuda":
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
        state = nvml.state(loaded.device)  # as it works on the prefill
        clock.wait()
        session.prepare_decode(logits)
        clock.wait()
        meter = Meter(loaded.device)
        clock.mark()
        for step in feed.steps:
            session.decode(step)
            clock.mark()
        prefill, _, *steps = clock.seconds()
        num_steps = len(steps)
        while meter.wants_more() and session.repeat_step():
            num_steps += 1
            clock.wait()
        joules = meter.joules()
        if joules is not None:
            joules /= workload.batch * num_steps
        mode = session.mode + ", fused attention" * bool(calls["fused"])
    return Run(prefill, steps, mode, state, joules, dict(calls))


def summed_up(runs: Sequence[Run], *, batch: int) -> dict[str, Any]:
    """TTFT, the first step and TPOT over all runs.

    TPOT is the median step of a run, without its first where there are more; `p90` and `max` are
    over the steps of all runs.
    """
    later = [run.step_seconds[1:] or run.step_seconds for run in runs]
    tpot = _summary([statistics.median(steps) for steps in later])
    every = sorted(seconds for steps in later for seconds in steps)
    tpot |= {"p90": every[min(len(every) - 1, len(every) * 9 // 10)], "max": every[-1]}
    joules = [run.joules for run in runs if run.joules is not None]
    return {
        "ttft_seconds": _summary([run.prefill_seconds for run in runs]),
        "first_decode_seconds": _summary([run.step_seconds[0] for run in runs]),
        "tpot_seconds": tpot,
        "tokens_per_second": batch / tpot["median"],
        "decode_mode": runs[-1].mode,
        "energy_joules_per_token": statistics.median(joules) if joules else None,
        "attention": dict(runs[-1].attention),
        "state": dict(runs[-1].state),
        "throttled": sorted({name for run in runs for name in run.state.get("throttled", ())}),
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
