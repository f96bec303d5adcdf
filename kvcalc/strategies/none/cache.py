"""A cache that refuses to hold anything.

It cannot stand in for computing anew: each step is run with the whole sequence and
`use_cache=False`. Handed to a model all the same, it raises instead of forgetting.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcalc.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class NothingLayer:
    """A layer without a tensor; nothing is ever put into it."""


class NothingCache(Cache):
    """As many layers as a model has, none of which holds anything."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401 - transformers'
        """Refused: it is what a model asks its cache first."""
        del args, kwargs
        msg = "none keeps nothing: run each step with the whole sequence and use_cache=False"
        raise UnsupportedError(msg)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> NothingCache:
    """A cache that holds nothing."""
    del capacity_tokens, parameters
    layers: list[Any] = [NothingLayer() for _ in DynamicCache(config=config).layers]
    return NothingCache(layers=layers)
