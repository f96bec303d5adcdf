"""The running FastKV cache.

Which tokens go on is chosen in the attention of the TSP layer and lies in the `plan` of the cache
until the prompt has been through all layers. Hooks on the decoder layers read it there: after the
TSP layer its hidden states are sliced, and before each later layer whatever else comes token by
token (rotary embeddings, position ids, masks). A model's code is not looked into; inputs of an
unknown shape are refused.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kvcalc.errors import UnsupportedError
from kvcalc.strategies import _evicting_cache
from kvcalc.strategies._evicting_cache import Attended, PromptEviction, RowsKind, evicting_cache
from kvcalc.strategies._scores import best_and_last, pooled, window_attention
from kvcalc.strategies.fastkv import check_passed, tsp_place

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

__all__ = ["attending", "build"]

PASSED = "passed"
"""The key of the plan under which `Passed` lies."""


class Passed(NamedTuple):
    """Tokens that go on: `chosen` [batch, tokens that do], in order, of a prompt of `tokens`."""

    chosen: Tensor
    tokens: int

    def rows(self, states: Tensor) -> Tensor:
        """States [batch or 1, tokens, ...] of the chosen tokens, [batch, chosen, ...]."""
        batch = self.chosen.shape[0]
        index = self.chosen.view(*self.chosen.shape, *[1] * (states.dim() - 2))
        return states.expand(batch, *states.shape[1:]).gather(
            1, index.expand(-1, -1, *states.shape[2:])
        )

    def sliced(self, name: str, value: Any) -> Any:  # noqa: ANN401 - arguments of a layer
        """An argument of a layer, for the chosen tokens; UnsupportedError where it holds the
        tokens in an order that is not known.
        """
        if isinstance(value, tuple | list):
            return type(value)([self.sliced(name, item) for item in value])
        if not isinstance(value, Tensor) or self.tokens not in value.shape:
            return value
        fits = value.shape[0] in (1, self.chosen.shape[0])
        if fits and value.dim() in (2, 3) and value.shape[1] == self.tokens:
            return self.rows(value)
        if fits and value.dim() == 4 and value.shape[2:] == (self.tokens, self.tokens):
            asked = self.rows(value.transpose(1, 2))
            return self.rows(asked.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)
        msg = (
            f"fastkv does not know the tokens in a decoder layer's argument {name} of shape "
            f"{list(value.shape)}; use snapkv"
        )
        raise UnsupportedError(msg)


class FastKVStorage(PromptEviction):
    """SnapKV's choice for each KV head, and at the TSP layer one for all heads together."""

    kernel: int
    pooling: str
    tsp_tokens: int
    tsp_place: int

    def choose(self, seen: Attended) -> Tensor:
        """The best before the window, and the window."""
        attention = window_attention(seen, self.window_tokens)[..., : -self.window_tokens]
        scores = pooled(attention.sum(2), self.kernel, self.pooling)
        rows = seen.key.shape[2]
        check_passed(self.tsp_tokens, budget_tokens=self.budget)
        if self.place == self.tsp_place < self.places - 1 and rows > self.tsp_tokens:
            together = scores.sum(1, keepdim=True)
            chosen = best_and_last(together, self.tsp_tokens, self.window_tokens)
            self.plan[PASSED] = Passed(chosen[:, 0], rows)
        return best_and_last(scores, self.budget, self.window_tokens)

    def attended(self, seen: Attended) -> None:
        """Positions go on from the whole prompt, of whatever part of it this layer was given."""
        super().attended(seen)
        passed = self.passed
        if passed is not None:
            self.num_tokens = passed.tokens
            if self.place == self.places - 1:
                del self.plan[PASSED]

    @property
    def passed(self) -> Passed | None:
        """What this layer is given of a prompt; None where that is all, or for a decode step."""
        return self.plan.get(PASSED) if self.place > self.tsp_place else None


@contextmanager
def attending(model: "PreTrainedModel") -> Iterator[Counter[str]]:
    """Let the model attend as the cache needs it, and pass on what the TSP layer chooses."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != _cached_layers(model):
        msg = (
            "fastkv slices hidden states between decoder layers, and does not find in this model "
            "one for each layer of its cache; use snapkv"
        )
        raise UnsupportedError(msg)
    with _evicting_cache.attending(model) as calls, ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for register, hook in (
                (layer.register_forward_pre_hook, _before),
                (layer.register_forward_hook, _after),
            ):
                hooks.callback(register(partial(hook, index), with_kwargs=True).remove)
        yield calls


def _cached_layers(model: "PreTrainedModel") -> int:
    return len(DynamicCache(config=model.config).layers)


def _before(
    index: int, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a layer: all that comes with the hidden states, for the tokens that are there."""
    del layer
    storage = _storage(index, args, kwargs)
    passed = storage.passed if storage else None
    if passed is None:
        return None
    hidden = "hidden_states"
    others = [passed.sliced(f"number {place}", item) for place, item in enumerate(args[1:], 1)]
    named = {
        key: value if key == hidden else passed.sliced(key, value) for key, value in kwargs.items()
    }
    return (*args[:1], *others), named


def _after(
    index: int,
    layer: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,  # noqa: ANN401 - hidden states, alone or first of a tuple
) -> Any:  # noqa: ANN401
    """After the TSP layer: the hidden states that go on, [batch, chosen, width]."""
    del layer
    storage = _storage(index, args, kwargs)
    if storage is None or storage.place != storage.tsp_place or PASSED not in storage.plan:
        return output
    passed = storage.plan[PASSED]
    if isinstance(output, tuple):
        return (passed.rows(output[0]), *output[1:])
    return passed.rows(output)


def _storage(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FastKVStorage | None:
    """What a decoder layer keeps its rows in; None where it was given another cache, or none."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache):
            storage = value.layers[index]
            return storage if isinstance(storage, FastKVStorage) else None
    return None


def build(
    config: "PreTrainedConfig",
    *,
    capacity_tokens: int,
    parameters: Mapping[str, Any],
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    settings = dict(parameters)
    depth, settings["tsp_tokens"] = settings.pop("tsp_depth"), settings.pop("tsp_share")
    cache = evicting_cache(config, FastKVStorage, settings, rows=rows)
    for layer in cache.layers:
        if isinstance(layer, FastKVStorage):
            layer.tsp_place = tsp_place(depth, layer.places)
    return cache
