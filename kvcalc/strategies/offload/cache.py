"""The running offloaded cache: a host tier for all layers, and a device tier of two at most.

On CUDA the host tier is page-locked, and copies run on a stream of their own, beside the
computation. On the CPU the two tiers are separate tensors, too, and copies happen at once.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcalc.errors import InputError
from kvcalc.strategies._running import Storage, check_readers, replace_storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer, each [tokens, batch, KV heads, width]: copies of successive tokens
are of one piece, which is what lets them run beside the computation.
"""


class Tier:
    """What is on the device: rows of the layer that computes and of the one fetched for it next.

    Only the layer that computes uses its rows, and the copy stream waits for all that was computed
    before it writes anywhere, so that memory is used again in the order of the computation.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.layers: list[HostStorage] = []
        self.on_device: dict[int, Pair] = {}
        self.most_layers = self.most_bytes = 0
        self._stream: torch.cuda.Stream | None = None

    def num_bytes(self) -> int:
        """Bytes of the rows on the device now."""
        return sum(rows.nbytes for pair in self.on_device.values() for rows in pair)

    def take(self, place: int, new_tokens: int) -> Pair:
        """A layer's past rows on the device with room for new ones behind; evicts all others."""
        self._wait()
        ahead = self.on_device.pop(place, None)
        self.on_device.clear()
        past = self.layers[place].past_rows()
        if ahead is None or len(ahead[0]) != past + new_tokens:
            ahead = self._fetch(place, new_tokens)
            self._wait()
        self.on_device[place] = ahead
        return ahead

    def fetch_after(self, place: int, new_tokens: int) -> None:
        """Start fetching the layer after this one, if it has rows."""
        if place + 1 < len(self.layers) and self.layers[place + 1].is_initialized:
            self.on_device[place + 1] = self._fetch(place + 1, new_tokens)
        self.most_layers = max(self.most_layers, len(self.on_device))
        self.most_bytes = max(self.most_bytes, self.num_bytes())

    def store(self, place: int, new_tokens: int) -> None:
        """Copy the new rows of a layer to the host; after the last one the device holds none."""
        layer = self.layers[place]
        kept = min(new_tokens, layer.num_rows)
        pieces = _ring(layer.num_tokens - kept, kept, layer.num_rows)
        with self._copying(layer.device):
            for host, rows in zip(layer.host, self.on_device[place], strict=True):
                newest = rows[len(rows) - kept :]
                for piece, part in zip(pieces, _parts(newest, pieces), strict=True):
                    host[piece].copy_(part, non_blocking=True)
        if place + 1 == len(self.layers):
            self._wait()
            self.on_device.clear()

    def _fetch(self, place: int, new_tokens: int) -> Pair:
        layer = self.layers[place]
        past = layer.past_rows()
        pieces = _ring(layer.num_stored - past, past, layer.num_rows)
        keys, values = (
            torch.empty((past + new_tokens, *host.shape[1:]), dtype=host.dtype, device=layer.device)
            for host in layer.host
        )
        with self._copying(layer.device):
            for host, rows in zip(layer.host, (keys, values), strict=True):
                for piece, part in zip(pieces, _parts(rows[:past], pieces), strict=True):
                    part.copy_(host[piece], non_blocking=True)
        return keys, values

    @contextmanager
    def _copying(self, device: torch.device) -> Iterator[None]:
        """On the copy stream, after all that was computed so far; on the CPU at once."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        """Make the computation wait for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def lock_pages(storages: Sequence[torch.UntypedStorage]) -> Callable[[], None]:
    """Lock memory of the host for copies that run beside the computation, byte for byte: torch's
    `pin_memory` takes the next power of two (16 GiB and a row are 32 GiB there).

    Returns what unlocks it, to be called before the memory is let go. Raises RuntimeError as CUDA
    does, for want of memory for one.
    """
    runtime = torch.cuda.cudart()
    locked: list[int] = []

    def unlock() -> None:
        torch.cuda.synchronize()  # a copy may be under way
        while locked:
            runtime.cudaHostUnregister(locked.pop())

    try:
        for storage in storages:
            if storage.nbytes():
                status = runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)
                torch.cuda.check_error(status)
                locked.append(storage.data_ptr())
    except RuntimeError:
        unlock()
        raise
    return unlock


class HostStorage(Storage):
    """`keys` and `values` [batch, KV heads, capacity or window - 1, width], in host memory.

    Token t is in row t modulo their number.
    """

    keys: Tensor
    values: Tensor
    _tier: Tier
    _place: int
    _unlock: "weakref.finalize[Any, Any] | None" = None
    num_stored = 0
    """Tokens that are in host memory or have fallen out of it."""

    @property
    def host(self) -> Pair:
        """The same rows, [capacity or window - 1, batch, KV heads, width]."""
        return self.keys.permute(2, 0, 1, 3), self.values.permute(2, 0, 1, 3)

    def start(self, keys: Tensor, values: Tensor) -> None:
        """All rows at once, pinned where copies to a GPU are to run beside the computation."""
        window, capacity = self.window, self._tier.capacity_tokens
        self.num_rows = capacity if window is None else min(capacity, window - 1)
        self.keys, self.values = (
            _by_head(
                torch.empty((self.num_rows, *states.shape[:2], states.shape[3]), dtype=states.dtype)
            )
            for states in (keys, values)
        )
        if keys.device.type == "cuda":
            storages = [rows.untyped_storage() for rows in (self.keys, self.values)]
            self._unlock = weakref.finalize(self, lock_pages(storages))
            self._unlock.atexit = False

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows from the tier and the new ones behind; the next layer's are on their way."""
        if self.num_tokens > self._tier.capacity_tokens:
            msg = (
                f"this cache was built for {self._tier.capacity_tokens:,} tokens and cannot take "
                f"{self.num_tokens:,}; build it with a larger capacity"
            )
            raise InputError(msg)
        new_tokens = keys.shape[-2]
        on_device = self._tier.take(self._place, new_tokens)
        for rows, states in zip(on_device, (keys, values), strict=True):
            rows[len(rows) - new_tokens :] = states.permute(2, 0, 1, 3)
        self._tier.fetch_after(self._place, new_tokens)
        self._tier.store(self._place, new_tokens)
        self.num_stored = self.num_tokens
        return _by_head(on_device[0]), _by_head(on_device[1])

    def past_rows(self) -> int:
        """Rows in host memory that the next token attends to."""
        return min(self.num_stored, self.num_rows)

    def reset(self) -> None:
        """Back to empty; host memory is let go."""
        if self._unlock is not None:
            self._unlock()
        super().reset()
        self.num_stored = 0


class OffloadedCache(DynamicCache):
    """transformers' cache for a model, with the rows of K and V in host memory."""

    def __init__(self, config: "PreTrainedConfig", capacity_tokens: int) -> None:
        check_readers(config)
        super().__init__(config=config)
        self.tier = Tier(capacity_tokens)
        for layer in self.layers:
            replace_storage(layer, HostStorage, _tier=self.tier, _place=len(self.tier.layers))
            if isinstance(layer, HostStorage):
                self.tier.layers.append(layer)

    @property
    def device_bytes(self) -> int:
        """Bytes of K and V on the device now: none between steps.

        A cache that is deeper than its model keeps those of the last layer that was used.
        """
        return self.tier.num_bytes()

    @property
    def most_device_bytes(self) -> int:
        """Most bytes of K and V that were on the device at a time."""
        return self.tier.most_bytes


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> OffloadedCache:
    """An empty cache that will hold `capacity_tokens` tokens; more raise InputError."""
    del parameters
    return OffloadedCache(config, capacity_tokens)


def _by_head(rows: Tensor) -> Tensor:
    """[tokens, batch, KV heads, width] as [batch, KV heads, tokens, width]."""
    return rows.permute(1, 2, 0, 3)


def _ring(start: int, count: int, num_rows: int) -> tuple[slice, slice]:
    """The rows of `count` tokens from token `start` on, in a ring of `num_rows`, oldest first.

    In 4 rows [4 5 2 3], tokens 2…5 are rows [2:4] and then [0:2].
    """
    first = start % num_rows if num_rows else 0
    before_end = min(count, num_rows - first)
    return slice(first, first + before_end), slice(0, count - before_end)


def _parts(rows: Tensor, pieces: tuple[slice, slice]) -> tuple[Tensor, ...]:
    """Successive rows, split as the pieces of a ring are."""
    return rows.split([piece.stop - piece.start for piece in pieces])
