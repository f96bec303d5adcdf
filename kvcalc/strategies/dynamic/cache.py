"""transformers' own DynamicCache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens, parameters
    return DynamicCache(config=config)
