"""Peak memory of a stretch of work, above a level.

On CUDA the caching allocator keeps count. On the CPU torch's own allocator events are recorded and
added up: the result is the same in every run, which sampling the process's RSS is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvcalc.dtypes import FORMATS
from kvcalc.engines import load_engine
from kvcalc.measure.models import LoadedModel, widest
from kvcalc.measure.workload import Workload
from kvcalc.sizing import SizeReport
from kvcalc.strategies import ChosenStrategy


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


def full_bytes(loaded: LoadedModel, workload: Workload) -> int:
    """Keys and values of all layers as transformers keeps them, in the model's dtype."""
    layers = load_engine("transformers").lay_out(loaded.architecture)
    return sum(
        layer.num_bytes(
            tokens=workload.total_tokens, batch=workload.batch, dtype=FORMATS[loaded.dtype]
        )
        for layer in layers
    )


def estimated_peaks(
    loaded: LoadedModel, workload: Workload, chosen: ChosenStrategy, predicted: SizeReport
) -> dict[str, int]:
    """Peaks above the weights to expect: an estimate, unlike the bytes of the cache.

    - Prefill: the cache, and of one piece of the prompt the widest activations that are alive at
      once in a layer: the residual, its norm and their sum, and either gate, up and their product,
      or values, and queries and keys thrice, as their rotation makes them.
    - Decode: the cache, and keys and values of its largest layer in the model's dtype, as often as
      the strategy makes them anew; where it recomputes, a prefill.
    """
    width = FORMATS[loaded.dtype].block_bytes
    hidden = widest(loaded.model, "hidden_size") or 0
    inner = 3 * (widest(loaded.model, "intermediate_size") or 4 * hidden)
    layers = load_engine("transformers").lay_out(loaded.architecture)
    rows = [part.rows() for layer in layers for part in layer.parts() if hasattr(part, "rows")]
    heads = widest(loaded.model, "num_attention_heads") or 0
    attending = max(
        (3 * (heads + row.kv_heads) * row.key_dim + row.kv_heads * row.value_dim for row in rows),
        default=0,
    )
    in_pieces = loaded.takes_chunks and not chosen.whole_prompt
    piece = workload.piece_tokens if in_pieces else workload.prompt_tokens
    activations = workload.batch * piece * (3 * hidden + max(inner, attending)) * width
    copied = max(
        (
            layer.num_bytes(
                tokens=workload.total_tokens, batch=workload.batch, dtype=FORMATS[loaded.dtype]
            )
            for layer in layers
        ),
        default=0,
    )
    cache = predicted.total_bytes
    decode = activations if chosen.recomputes else chosen.copies * copied
    # One layer has all of the prompt until it has chosen what it keeps.
    whole = copied if chosen.whole_prompt else 0
    return {"prefill_bytes": cache + whole + activations, "decode_bytes": cache + decode}
