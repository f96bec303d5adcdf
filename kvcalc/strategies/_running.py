"""What running caches share: transformers' own cache for a model, with the storage of its keys and
values replaced layer by layer.

transformers builds the layers that a model needs (windows, recurrent states, index keys); `stored`
puts a strategy's way of keeping K and V in place of concatenation and leaves all else alone.
"""

import functools
import inspect
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvcalc.errors import UnsupportedError
from kvcalc.releases import CACHE_ARGUMENTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel


def feed(model: "PreTrainedModel", cache: "Cache", tokens: Tensor) -> Tensor:
    """Feed `tokens` [batch, new tokens] after those in the cache; returns the logits
    [batch, vocabulary] after the last of them.
    """
    arguments: dict[str, Any] = {
        _cache_argument(type(model).forward): cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    logits: Tensor = model(input_ids=tokens, **arguments).logits
    return logits[:, -1]


@functools.cache
def _cache_argument(forward: Hashable) -> str:
    takes = inspect.signature(cast("Any", forward)).parameters
    return next((name for name in CACHE_ARGUMENTS if name in takes), CACHE_ARGUMENTS[0])


class Storage(DynamicLayer):  # type: ignore[no-untyped-call]
    """How one layer keeps its keys and values, each [batch, KV heads, tokens, width].

    Subclasses say `start` and `append`; tensors in attributes without a leading underscore are what
    is held. A layer with a window must hand its attention the last `window` - 1 tokens before the
    new ones; which of them it keeps is its own affair.
    """

    is_croppable = False
    num_tokens = 0

    @property
    def window(self) -> int | None:
        """Tokens of the layer's window, None when it sees all."""
        return getattr(self, "sliding_window", None)

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Allocate, before the first tokens come."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens; returns the keys and values that this step attends to, in order.

        `num_tokens` counts the new ones already.
        """
        raise NotImplementedError

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - transformers' signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take the new tokens of one step, as transformers calls it."""
        del args, kwargs
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.start(key_states, value_states)
            self.is_initialized = True
        self.num_tokens += key_states.shape[-2]
        self.cumulative_length = self.num_tokens  # what window layers count their mask by
        return self.append(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions are counted from."""
        return self.num_tokens

    def reset(self) -> None:
        """Back to empty; storage is let go at once."""
        # Let go first: before 5.18 transformers zeroes the rows of a layer and goes on behind them.
        self.is_initialized = False
        for name in vars(self).keys() & {"keys", "values"}:
            setattr(self, name, None)
        super().reset()
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Not written: speculative decoding."""
        self._refuse("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not written: beam search."""
        self._refuse("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not written: beam search and sampling of several answers."""
        self._refuse("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not written: contrastive search."""
        self._refuse("batch_select_indices", indices)

    def _refuse(self, what: str, argument: object) -> None:
        del argument
        msg = f"{type(self).__name__} cannot {what}"
        raise UnsupportedError(msg)


def stored(config: "PreTrainedConfig", storage: type[Storage], **settings: object) -> "Cache":
    """An empty cache of the model whose layers for the decoder's tokens keep K and V in a
    `storage`, with `settings` as attributes.

    Left as they are: layers that transformers' own `cache_utils` does not define, and cross
    attention among a decoder's own layers (Mllama). Raises UnsupportedError like `check_readers`.
    """
    check_readers(config)
    cache = DynamicCache(config=config)
    crossed = getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ()
    for index, layer in enumerate(cache.layers):
        if index not in crossed:
            replace_storage(layer, storage, **settings)
    return cache


READ_PAST_IT = frozenset({"diffusion_gemma_text", "glm5_next_text"})
"""Decoders whose modeling file takes a layer's `keys` for all of its keys (transformers 5.23.0)."""


def check_readers(config: "PreTrainedConfig") -> None:
    """Raise UnsupportedError for a model that reads stored keys past its cache's interface."""
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in READ_PAST_IT:
        msg = f"model_type {model_type!r} reads stored keys past the interface of its cache"
        raise UnsupportedError(msg)


def replace_storage(layer: object, storage: type[Storage], **settings: object) -> None:
    """Make one layer of a new cache keep its K and V in a `storage`, if it keeps any."""
    own = type(layer)
    if not isinstance(layer, DynamicLayer) or own.__module__ != DynamicLayer.__module__:
        return
    name = f"{storage.__name__.removesuffix('Storage')}{own.__name__}"
    cast("Any", layer).__class__ = type(name, (storage, own), {})
    for key, value in settings.items():
        setattr(layer, key, value)
