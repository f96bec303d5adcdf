"""One prompt and its decode steps, fed to a model under one strategy.

Decode steps are fixed beforehand (teacher forcing), so that every strategy does the same work and
its logits can be held against those of the full cache.
"""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvcalc.measure.held import LayerBytes, held_by_layer
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.workload import Workload
from kvcalc.strategies import ChosenStrategy

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Feed(NamedTuple):
    """What is fed: `prompt` [batch, prompt_tokens] and the decode `steps`, each [batch, 1].

    `answers` [batch] is what the first step should be answered with, None where nobody knows.
    """

    prompt: Tensor
    steps: tuple[Tensor, ...]
    answers: Tensor | None = None


def random_feed(loaded: LoadedModel, workload: Workload) -> Feed:
    """Random tokens of the model's vocabulary, the same for the same seed."""
    embeddings: Any = loaded.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch, workload.total_tokens)
    tokens = torch.randint(embeddings.num_embeddings, shape, generator=generator)
    return split_feed(tokens.to(loaded.device), workload)


def split_feed(tokens: Tensor, workload: Workload) -> Feed:
    """A row of tokens [batch, prompt + decode] as a prompt and its steps."""
    prompt, rest = tokens.split([workload.prompt_tokens, workload.decode_tokens], dim=1)
    return Feed(prompt, tuple(rest.split(1, dim=1)))


class Session:
    """A model with an empty cache of one strategy."""

    def __init__(self, loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> None:
        self._model = loaded.model
        self._recomputes = chosen.recomputes
        self._chunk = workload.chunk if loaded.takes_chunks else workload.prompt_tokens
        self._seen: list[Tensor] = []
        module = importlib.import_module(f"{chosen.module}.cache")
        self.cache: Cache = module.build(
            loaded.model.config,
            capacity_tokens=workload.total_tokens,
            parameters=chosen.parameters,
        )

    def prefill(self, prompt: Tensor) -> Tensor:
        """Feed the prompt, chunk by chunk; returns the logits [batch, vocabulary] after it."""
        pieces = [prompt] if self._recomputes else prompt.split(self._chunk, dim=1)
        for piece in pieces[:-1]:
            self._forward(piece)
        return self._forward(pieces[-1])

    def decode(self, step: Tensor) -> Tensor:
        """Feed one token of each sequence; returns the logits [batch, vocabulary] after it."""
        return self._forward(step)

    def held(self) -> list[LayerBytes]:
        """What each layer of the cache holds now."""
        return held_by_layer(self.cache)

    def _forward(self, tokens: Tensor) -> Tensor:
        if self._recomputes:
            self._seen.append(tokens)
            whole = torch.cat(self._seen, dim=1)
            output = self._model(input_ids=whole, use_cache=False, logits_to_keep=1)
        else:
            output = self._model(
                input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = output.logits
        return logits[:, -1]


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
def undisturbed() -> Iterator[None]:
    """No autograd, and no garbage collection in the middle of a phase."""
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        gc.enable()


def release(device: torch.device) -> None:
    """Give back what a strategy left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
