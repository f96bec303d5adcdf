"""The running int2 cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvcalc.strategies._packed_attention import use_fused
from kvcalc.strategies._packed_cache import PackedStorage, packed_cache
from kvcalc.strategies._running import Storage
from kvcalc.strategies.int2 import BITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build", "storage"]

attending = use_fused


def storage(
    config: "PreTrainedConfig", parameters: Mapping[str, int]
) -> tuple[type[Storage], dict[str, object]]:
    """What keeps the rows of a layer, and its attributes."""
    del config
    return PackedStorage, {"bits": BITS, **parameters}


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    return packed_cache(config, bits=BITS, parameters=parameters)
