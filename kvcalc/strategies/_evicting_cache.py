"""The mechanism of evicting caches: attention that shows a layer what it attended to, and layers
that then choose which rows they go on with.

`attention` is an attention function of transformers. A layer's `update` hands out its rows and
waits for it; it runs the same SDPA kernel as without, with a mask of the rows that are really
there, and hands queries, keys and values (after their rotation) to the layer. So the rows of a
layer are let go before those of the next are made, and no model needs code of its own. Positions
stay those of the tokens seen. Prompts come without padding.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcalc.errors import UnsupportedError
from kvcalc.strategies._evicted import check_window
from kvcalc.strategies._plain_attention import attends_by_sdpa, in_place_of_sdpa
from kvcalc.strategies._running import Storage, check_readers, replace_storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel

HARMLESS = frozenset({"cache_position", "is_causal", "position_ids", "sliding_window", "use_cache"})
"""Arguments of an attention function that change nothing for a layer that sees all."""


class Attended(NamedTuple):
    """What one call of a layer's attention saw; all after rotation.

    `query` is [batch, query heads, new tokens, width], `key` and `value` [batch, heads, rows,
    width]: the rows that were there and the new ones last. Of latents they are the expanded heads.
    `kv_heads` is how many heads the cache stores, `mask` [batch or 1, kv_heads or 1, new tokens,
    rows] is True where a query sees a row, None where it sees all rows before and at its own.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    kv_heads: int


class Rows(Storage):
    """Rows as they are: `keys` and `values` [batch, KV heads, tokens, width]."""

    keys: Tensor
    values: Tensor

    def start(self, keys: Tensor, values: Tensor) -> None:
        """No rows yet."""
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copied, so that nothing else of what they were computed in stays alive."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values


RowsKind = tuple[type[Storage], Mapping[str, object]]
"""What keeps the rows of a layer, and its attributes."""


class EvictingStorage(Storage):
    """A layer that looks at what its attention saw. These are settings of a cache's layers.

    - `budget`: tokens; `window_tokens`: how many of the last are always kept;
    - `place` of `places`: which of the evicting layers of the model it is, counted from 0;
    - `plan`: an object that all layers of the cache share.
    """

    keys: Any = None
    values: Any = None
    budget: int
    window_tokens: int = 0
    place: int
    places: int
    plan: dict[str, Any]
    kept: "list[Tensor] | None" = None
    """Set to a list, it takes at each eviction which of the rows that were there stay, as booleans
    [batch, KV heads, rows]. For those who want to know; nothing here reads it.
    """

    @property
    def visible(self) -> Tensor | None:
        """Which rows that are handed out are tokens' [batch, KV heads, rows]; None: all are."""
        return None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - transformers' signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take the new tokens; the layer's attention must come next."""
        _turn.begin(self)
        self.kv_heads = key_states.shape[1]
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, module: torch.nn.Module, seen: Attended) -> Tensor:
        """Attention itself: [batch, new tokens, query heads, width of V]."""
        mask = seen.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(seen.query.shape[1] // mask.shape[1], dim=1)
        output: Tensor = sdpa_attention_forward(
            module,
            seen.query,
            seen.key,
            seen.value,
            mask,
            scaling=seen.scaling,
            is_causal=mask is None and seen.query.shape[2] > 1,
        )[0]
        return output

    def attended(self, seen: Attended) -> None:
        """Look at what attention saw, and let go of what is not kept."""
        raise NotImplementedError

    def record(self, chosen: Tensor, rows: int) -> None:
        """Tell those who want to know which of `rows` rows stay."""
        if self.kept is not None:
            stays = torch.zeros(*chosen.shape[:2], rows, dtype=torch.bool, device=chosen.device)
            self.kept.append(stays.scatter(2, chosen, value=True))


class PromptEviction(EvictingStorage):
    """Chooses once, when the prompt is there; later tokens are appended.

    The first tokens are the prompt. `rows` keeps what is chosen.
    """

    rows_kind: RowsKind = (Rows, {})
    rows: Storage
    _prompt: tuple[Tensor, Tensor] | None = None

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Nothing is kept before attention was there."""
        del keys, values
        kind, settings = self.rows_kind
        self.rows = kind()
        for key, value in settings.items():
            setattr(self.rows, key, value)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt is attended to whole; later tokens with what was kept."""
        if self.num_tokens == keys.shape[2]:
            self._prompt = keys, values
            return keys, values
        return self.rows.update(keys, values)

    def attended(self, seen: Attended) -> None:
        """After the prompt: keep what is chosen."""
        if self._prompt is None:
            return
        keys, values = self._prompt
        if keys.shape[2] > self.budget:
            check_window(type(self).__name__, budget_tokens=self.budget, window=self.window_tokens)
            chosen = self.choose(seen)
            self.record(chosen, keys.shape[2])
            keys, values = taken(keys, chosen), taken(values, chosen)
        self._prompt = None
        self.rows.update(keys, values)

    @property
    def prompt_keys(self) -> Tensor:
        """While it chooses: the keys as they would be stored, [batch, KV heads, tokens, width]."""
        if self._prompt is None:
            msg = "a prompt is there only until its rows are chosen"
            raise RuntimeError(msg)
        return self._prompt[0]

    def choose(self, seen: Attended) -> Tensor:
        """Which tokens of a prompt beyond the budget stay, [batch, KV heads, budget], in order."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        vars(self).pop("rows", None)


class StepEviction(EvictingStorage):
    """Chooses after each step in which more rows than the budget are there.

    `keys` and `values` are [batch, KV heads, rows, width]; `beside` names further tensors
    [batch, KV heads, rows] that go with them.
    """

    keys: Tensor
    values: Tensor
    beside: tuple[str, ...] = ()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All rows that are there, and the new ones."""
        if self.num_tokens == keys.shape[2]:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], dim=2)
            self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def attended(self, seen: Attended) -> None:
        """Note what attention says, and keep what is chosen."""
        self.observe(seen)
        if self.keys.shape[2] > self.budget:
            chosen = self.choose(seen)
            self.record(chosen, self.keys.shape[2])
            self.keys, self.values = taken(self.keys, chosen), taken(self.values, chosen)
            for name in self.beside:
                setattr(self, name, getattr(self, name).gather(2, chosen))
        elif self.num_tokens == seen.query.shape[2]:
            # Copied, so that nothing else of what they were computed in stays alive.
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def observe(self, seen: Attended) -> None:
        """Bring what stands beside the rows up to date; the new ones have nothing yet."""

    def choose(self, seen: Attended) -> Tensor:
        """Which rows stay, [batch, KV heads, budget], in order."""
        raise NotImplementedError


def taken(states: Tensor, chosen: Tensor) -> Tensor:
    """Rows [batch, heads, chosen, width] of states [batch, heads, rows, width], in new storage."""
    index = chosen[..., None].expand(-1, -1, -1, states.shape[-1])
    return states.gather(2, index)


def evicting_cache(
    config: "PreTrainedConfig",
    storage: type[EvictingStorage],
    parameters: Mapping[str, Any],
    *,
    rows: RowsKind | None = None,
) -> "Cache":
    """An empty cache of the model whose layers that see all tokens are `storage`, with the
    parameters as attributes (`window` as `window_tokens`: a layer's own window is another thing).

    `rows` keeps what is kept, and the tokens of the other layers. Raises UnsupportedError for a
    model that has no such layer, or reads stored keys past its cache's interface.
    """
    check_readers(config)
    _turn.forget()
    cache = DynamicCache(config=config)
    whole = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if not whole:
        msg = "no layer of this model attends to all tokens: there is nothing to evict from"
        raise UnsupportedError(msg)
    named = {"window_tokens" if key == "window" else key: val for key, val in parameters.items()}
    settings: dict[str, Any] = {"plan": {}, "places": len(whole), **named}
    if rows is not None:
        settings["rows_kind"] = rows
        for layer in cache.layers:
            if type(layer) is not DynamicLayer:
                replace_storage(layer, rows[0], **rows[1])
    for place, layer in enumerate(whole):
        replace_storage(layer, storage, place=place, **settings)
    return cache


class _Turn:
    """The layer whose attention comes next."""

    def __init__(self) -> None:
        self._layer: EvictingStorage | None = None

    def begin(self, layer: EvictingStorage) -> None:
        """A layer was given new tokens; UnsupportedError where another's attention never came."""
        if self._layer is not None:
            self.forget()
            msg = (
                "this model attends past transformers' attention interface, or was not run in "
                "`attending`: nothing says what to keep"
            )
            raise UnsupportedError(msg)
        self._layer = layer

    def end(self) -> EvictingStorage | None:
        """That layer, None where attention comes of a layer that does not evict."""
        layer, self._layer = self._layer, None
        return layer

    def forget(self) -> None:
        """A run was broken off."""
        self._layer = None


_turn = _Turn()


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401 - transformers' signature
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [batch, heads, tokens, width] to an output
    [batch, tokens, heads, width].

    Raises UnsupportedError for a layer that evicts and whose attention is more than
    softmax(q·k)·v over the rows before.
    """
    layer = _turn.end()
    if layer is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    unusual = sorted(
        name
        for name, argument in kwargs.items()
        if name not in HARMLESS and argument is not None and argument is not False
    )
    if unusual or dropout:
        msg = f"evicting does not cover attention with {', '.join(unusual) or 'dropout'}"
        raise UnsupportedError(msg)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _visible_rows(layer, query, key)
    seen = Attended(query, key, value, mask, scale, layer.kv_heads)
    result = layer.attend(module, seen)
    layer.attended(seen)
    return result, None


def _visible_rows(layer: EvictingStorage, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask of `Attended`."""
    new, rows = query.shape[2], key.shape[2]
    mask = None
    if 1 < new < rows:
        mask = torch.ones(new, rows, dtype=torch.bool, device=key.device).tril(rows - new)
        mask = mask[None, None]
    visible = layer.visible
    if visible is not None:
        mask = visible[:, :, None] if mask is None else mask & visible[:, :, None]
    return mask


@contextmanager
def attending(model: "PreTrainedModel") -> Iterator[Counter[str]]:
    """Let the model attend through `attention`.

    Yields an empty counter: no call is another kernel's. Raises UnsupportedError for a model that
    does not attend through SDPA.
    """
    if not attends_by_sdpa(model):
        msg = "evicting needs a model that attends through sdpa"
        raise UnsupportedError(msg)
    _turn.forget()
    with in_place_of_sdpa(attention):
        yield Counter()
