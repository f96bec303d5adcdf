"""The running int2 cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvcalc.strategies._packed_cache import packed_cache
from kvcalc.strategies.int2 import BITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return packed_cache(config, bits=BITS, parameters=parameters)
