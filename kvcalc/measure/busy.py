"""How long a GPU works on a stretch: what is left of its wall time when launching is taken away.

Decode steps of one sequence take a GPU less time than Python takes to launch them, so that wall
time says little about a strategy there.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Busy:
    """Set when the stretch has ended: the `seconds` in which some kernel or copy ran, None where
    nothing can tell.
    """

    seconds: float | None = None


@contextmanager
def busy_time(device: torch.device) -> Iterator[Busy]:
    """Have torch's profiler (CUPTI) note what runs on the device; its wall time grows by that."""
    busy = Busy()
    if device.type != "cuda":
        yield busy
        return
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        yield busy
        torch.cuda.synchronize(device)
    events = trace.profiler.kineto_results.events()
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type().name == "CUDA"
    ]
    busy.seconds = covered(spans) / 1e9 if spans else None


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of the union of spans, each from its start to its end.

    Kernels overlap on several streams: 0–4 and 3–6 are 6, not 7.
    """
    total = until = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total
