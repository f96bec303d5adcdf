"""The running quanto-int2 cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvcalc.strategies._library_cache import library_cache
from kvcalc.strategies.quanto_int2 import BACKEND, BITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return library_cache(config, backend=BACKEND, bits=BITS, parameters=parameters)
