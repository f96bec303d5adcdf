"""transformers' own StaticCache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import StaticCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache that will hold `capacity_tokens` tokens."""
    del parameters
    return StaticCache(config=config, max_cache_len=capacity_tokens)
