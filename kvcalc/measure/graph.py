"""Decode steps replayed as one CUDA graph: the time of the work on the device, not of launching it.

Capturable is a step that is the same work at the same addresses each time: a StaticCache, written
in place at a position that is counted on the device. transformers 5.23.0 then derives positions and
mask from that counter (`StaticLayer.cumulative_length`) without reading it. Window layers count in
Python and would repeat the window of the step that was captured: they stay eager, as do states.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import StaticLayer

from kvcalc.measure.models import LoadedModel
from kvcalc.strategies import ChosenStrategy
from kvcalc.strategies._running import feed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel

GRAPH = "CUDA graph"
IN_PLACE = "static"
"""The strategy whose cache is written in place."""

KEEPS_NOTHING = getattr(cache_utils, "DummyLayer", StaticLayer)
"""What stands for a layer without a cache, in the releases that have one for it (5.23.0 on)."""

WARM_UPS = 3
"""Steps before capture, as torch's recipe has it: libraries load and choose kernels in them."""

Capture = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]
"""Takes a step and what undoes it on the device; returns what repeats the step."""


def decode_mode(loaded: LoadedModel, chosen: ChosenStrategy) -> str:
    """How decode steps would be run: `CUDA graph`, or `eager` with the reason in brackets.

    What was run is `GraphedDecode.mode`, for capture may fail.
    """
    if chosen.name != IN_PLACE:
        return _eager(f"the cache of {chosen.name} is not written in place")
    cache = chosen.build(loaded.model.config, capacity_tokens=1, prompt_tokens=1)
    reason = why_eager(loaded.model, cache) or _off_cuda(loaded.device)
    return _eager(reason) if reason else GRAPH


def why_eager(model: "PreTrainedModel", cache: "Cache") -> str | None:
    """What keeps the steps of this model with this cache from being captured; None if nothing."""
    if not model._can_compile_fullgraph:  # noqa: SLF001 - transformers' word on a model's control flow
        return f"{type(model).__name__} decides on values in Python"
    for layer in cache.layers:
        # Not isinstance: every kind of layer that counts otherwise is derived from StaticLayer.
        if type(layer) not in (StaticLayer, KEEPS_NOTHING):
            return f"{type(layer).__name__} keeps its position in Python"
    return None


class GraphedDecode:
    """Decode steps of a model whose static cache has taken the prompt, captured if they can be.

    `mode` says how they are run, in the words of `decode_mode`. The graph holds on to its memory
    and to the cache for as long as this object lives.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        cache: "Cache",
        logits: Tensor,
        *,
        capture: Capture | None = None,
    ) -> None:
        """Capture the step after the prompt, whose `logits` [batch, vocabulary] are given.

        The cache must have room for one token; it is left as it was, but for the row of that token.
        """
        self._model, self._cache = model, cache
        self._token = torch.zeros((logits.shape[0], 1), dtype=torch.long, device=logits.device)
        self._logits = torch.empty_like(logits)
        self._replay = self._step
        self.mode = GRAPH
        self._counters = [
            layer.cumulative_length for layer in cache.layers if isinstance(layer, StaticLayer)
        ]
        before = [counter.clone() for counter in self._counters]

        def rewind() -> None:
            for counter, value in zip(self._counters, before, strict=True):
                counter.copy_(value)

        reason = why_eager(model, cache)
        if reason is None and capture is None:
            reason = _off_cuda(logits.device)
        if reason is None:
            try:
                with torch.cuda.device_of(logits):
                    self._replay = (capture or cuda_capture)(self._step, rewind)
            except RuntimeError as error:
                reason = f"capture failed: {str(error).partition(chr(10))[0]:.120}"
            rewind()
        if reason is not None:
            self.mode = _eager(reason)

    def step(self, token: Tensor) -> Tensor:
        """Feed one token of each sequence, [batch, 1]; returns the logits [batch, vocabulary]."""
        self._token.copy_(token)
        self._replay()
        return self._logits.clone()

    def repeat(self) -> bool:
        """Do the work of the last step again, at its place; False where it is not captured."""
        if self.mode != GRAPH:
            return False
        for counter in self._counters:
            counter.sub_(1)
        self._replay()
        return True

    def _step(self) -> None:
        """What is captured: token buffer to logits buffer."""
        self._logits.copy_(feed(self._model, self._cache, self._token))


def cuda_capture(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """Warm up on a stream of its own, then capture; the step is not run by capturing it.

    Raises RuntimeError for a step that waits for the device or allocates outside of the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Not torch.cuda.graph, which empties the allocators: whoever runs next would pay for that.
    with torch.cuda.stream(stream):
        # Other threads may ask the driver for memory in use meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    return graph.replay


def _off_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"no CUDA on {device}"


def _eager(reason: str) -> str:
    return f"eager ({reason})"
