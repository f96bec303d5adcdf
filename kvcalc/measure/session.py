"""One prompt and its decode steps, fed to a model under one strategy.

Decode steps are fixed beforehand (teacher forcing), so that every strategy does the same work and
its logits can be held against those of the full cache.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcalc.measure.graph import IN_PLACE, GraphedDecode
from kvcalc.measure.held import LayerBytes, held_by_layer
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.workload import Workload
from kvcalc.strategies import ChosenStrategy, _plain_attention
from kvcalc.strategies._running import feed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Session:
    """A model with an empty cache of one strategy."""

    def __init__(self, loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._in_place = chosen.name == IN_PLACE
        self._graph: GraphedDecode | None = None
        self._recomputes = chosen.recomputes
        in_pieces = loaded.takes_chunks and not chosen.whole_prompt
        self._chunk = workload.piece_tokens if in_pieces else workload.prompt_tokens
        self._seen: list[Tensor] = []
        self._running = chosen.running
        self.cache: Cache = chosen.build(
            loaded.model.config,
            capacity_tokens=workload.total_tokens,
            prompt_tokens=workload.prompt_tokens,
        )

    @property
    def mode(self) -> str:
        """How decode steps are run: `eager` or `CUDA graph`, with the reason for the former where
        the latter was tried.
        """
        return self._graph.mode if self._graph else "eager"

    def prepare_decode(self, logits: Tensor) -> None:
        """Capture decode steps where strategy and device allow; `logits` are those after the
        prompt. It takes a while, and is no part of any step.
        """
        if self._device.type == "cuda" and self._in_place:
            self._graph = GraphedDecode(self._model, self.cache, logits)

    def prefill(self, prompt: Tensor) -> Tensor:
        """Feed the prompt, chunk by chunk; returns the logits [batch, vocabulary] after it."""
        if hasattr(self._running, "prefill"):
            logits: Tensor = self._running.prefill(self._model, self.cache, prompt)
            return logits
        pieces = [prompt] if self._recomputes else prompt.split(self._chunk, dim=1)
        for piece in pieces[:-1]:
            self._forward(piece)
        return self._forward(pieces[-1])

    def decode(self, step: Tensor) -> Tensor:
        """Feed one token of each sequence; returns the logits [batch, vocabulary] after it."""
        return self._graph.step(step) if self._graph else self._forward(step)

    def repeat_step(self) -> bool:
        """Do the work of the last step once more, at its place in the cache; False where steps
        cannot be repeated.
        """
        return self._graph is not None and self._graph.repeat()

    def held(self) -> list[LayerBytes]:
        """What each layer of the cache holds now."""
        return held_by_layer(self.cache)

    def observed(self) -> dict[str, float]:
        """What the cache tells about this run, by name."""
        observed = getattr(self._running, "observed", None)
        return observed(self.cache) if observed else {}

    def _forward(self, tokens: Tensor) -> Tensor:
        if self._recomputes:
            self._seen.append(tokens)
            whole = torch.cat(self._seen, dim=1)
            logits: Tensor = self._model(input_ids=whole, use_cache=False, logits_to_keep=1).logits
            return logits[:, -1]
        return feed(self._model, self.cache, tokens)


@contextmanager
def few_objects() -> Iterator[None]:
    """Collecting garbage looks only at what is made from here on: a loaded model and its libraries
    are a million objects, which would be gone through before every run.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def undisturbed(loaded: LoadedModel, chosen: ChosenStrategy) -> Iterator[Counter[str]]:
    """No autograd, no garbage collection in the middle of a phase, one backend of SDPA, and the
    attention that the strategy's cache needs, or the plain one.

    Yields the calls of that attention by what answered them; it stays empty where nobody counts.
    """
    gc.collect()
    gc.disable()
    try:
        attending = getattr(chosen.running, "attending", _plain_attention.attending)
        backend = _plain_attention.one_backend(loaded.device)
        with torch.inference_mode(), backend, attending(loaded.model) as calls:
            yield calls
    finally:
        gc.enable()


def release(device: torch.device) -> None:
    """Give back what a strategy left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
