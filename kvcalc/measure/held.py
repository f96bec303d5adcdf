"""What a running cache holds: the storages its tensors keep alive, counted once each.

A tensor's own size is not what it costs: a window layer's 15 visible tokens may be a view that
keeps a whole prompt alive. Constants that a layer keeps to itself (attributes with a leading
underscore, such as the 8-byte window length of DynamicSlidingWindowLayer) are settings, not cache.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class LayerBytes(NamedTuple):
    """One layer: `held_bytes` of unique storages, `logical_bytes` of the tensors' own elements."""

    held_bytes: int
    logical_bytes: int


def held_by_layer(cache: "Cache") -> list[LayerBytes]:
    """What each layer of a cache holds; a storage shared by layers counts in the first."""
    seen: set[int] = set()
    layers = []
    for layer in cache.layers:
        held_bytes = logical_bytes = 0
        for tensor in _state_tensors(layer):
            logical_bytes += tensor.numel() * tensor.element_size()
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held_bytes += storage.nbytes()
        layers.append(LayerBytes(held_bytes, logical_bytes))
    return layers


def _state_tensors(layer: object) -> Iterator[Tensor]:
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            yield from _tensors(value)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        # A subclass that wraps tensors (quanto's) has no storage of its own and the size it stands
        # for: what it holds is inside.
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, CacheLayerMixin):  # one layer that keeps its rows in another
        yield from _state_tensors(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
