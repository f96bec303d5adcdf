"""Peak memory of a stretch of work, above the level at its start.

On CUDA the caching allocator keeps count. On the CPU torch's own allocator events are recorded and
added up: the result is the same in every run, which sampling the process's RSS is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Peak:
    """`num_bytes` is set when the stretch has ended."""

    num_bytes = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the enclosed work on `device`; slows it down on the CPU."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - start_bytes
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield peak
    level_bytes = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level_bytes += event.nbytes()
            peak.num_bytes = max(peak.num_bytes, level_bytes)
