"""Peak memory of a stretch of work, above a level.

On CUDA the caching allocator keeps count. On the CPU torch's own allocator events are recorded and
added up: the result is the same in every run, which sampling the process's RSS is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Peak:
    """Set when the stretch has ended: `num_bytes`, the most that was allocated in it, and
    `left_bytes`, what of it still is; both above what was allocated before it, plus `level_bytes`.
    """

    num_bytes = 0
    left_bytes = 0


@contextmanager
def peak_memory(device: torch.device, *, level_bytes: int = 0) -> Iterator[Peak]:
    """Measure the peak of the enclosed work on `device`; slows it down on the CPU.

    `level_bytes` were allocated by what is measured before this stretch (its `left_bytes`).
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start_bytes = torch.cuda.memory_allocated(device) - level_bytes
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - start_bytes
        peak.left_bytes = torch.cuda.memory_allocated(device) - start_bytes
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield peak
    peak.num_bytes = level_bytes
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level_bytes += event.nbytes()
            peak.num_bytes = max(peak.num_bytes, level_bytes)
    peak.left_bytes = level_bytes
