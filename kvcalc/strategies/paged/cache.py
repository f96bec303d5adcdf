"""The running paged cache: blocks of a pool, gathered through a block table for attention.

The gather is plain PyTorch: each step copies the rows that it attends to. No time is saved here;
what is measured is what paging keeps.
"""

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from kvcalc.errors import InputError, UnsupportedError
from kvcalc.strategies._running import Storage, stored
from kvcalc.strategies.paged import blocks_in_pool, blocks_used

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


class PagedStorage(Storage):
    """One layer's pools and table.

    `key_pool` and `value_pool` are [blocks, block, KV heads, width], `table` is [batch, blocks in
    use] int32: the pool's blocks that hold each sequence's tokens, in order.
    """

    _block: int
    key_pool: Tensor
    value_pool: Tensor
    table: Tensor
    blocks = range(0)
    """Blocks of each sequence that the table's columns stand for, counted from its start."""

    @property
    def keys(self) -> NoReturn:
        """Refused: some models read a cache's keys past its methods, and would misread a pool."""
        msg = "paged keeps no keys of one piece, which this model's code reads from its cache"
        raise UnsupportedError(msg)

    @keys.setter
    def keys(self, keys: object) -> None:
        """Nothing: transformers sets None."""

    def start(self, keys: Tensor, values: Tensor) -> None:
        """An empty table, and an empty pool unless a reset left one."""
        self.blocks = range(0)
        self.table = torch.empty(len(keys), 0, dtype=torch.int32, device=keys.device)
        if "key_pool" not in vars(self):
            self._free: deque[int] = deque()
            self.key_pool = _empty_pool(keys, self._block)
            self.value_pool = _empty_pool(values, self._block)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new rows into blocks; what attention sees is gathered or at hand."""
        if len(keys) != len(self.table):
            msg = f"{len(self.table)} sequences are cached, and {len(keys)} came"
            raise InputError(msg)
        if self.window is None:
            self._write(keys, values)
            return self._gather(0, self.num_tokens)
        start = self.num_tokens - keys.shape[-2]
        past_keys, past_values = self._gather(max(start - self.window + 1, 0), start)
        self._write(keys, values)
        return torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)

    def finish(self, sequence: int) -> None:
        """Let go of one sequence: its blocks are free, and those after it move up by one.

        The next step must come without it. States of a recurrent layer are not touched.
        """
        self._free.extend(self.table[sequence].tolist())
        self.table = torch.cat([self.table[:sequence], self.table[sequence + 1 :]])

    def reset(self) -> None:
        """Let go of all sequences; the pool and its free blocks stay."""
        if self.is_initialized:
            self._free.extend(self.table.flatten().tolist())
            self.table = self.table.new_empty(0, 0)
        super().reset()

    @property
    def free_blocks(self) -> int:
        """Blocks of the pool that no sequence uses."""
        return len(self._free)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Free the blocks that fell out, take those that are needed, and fill them."""
        rows = None if self.window is None else self.window - 1
        self._take_blocks(rows)
        kept = keys.shape[-2] if rows is None else min(keys.shape[-2], rows)
        slots = self._slots(self.num_tokens - kept, self.num_tokens)
        for pool, states in ((self.key_pool, keys), (self.value_pool, values)):
            newest = states[:, :, states.shape[-2] - kept :]
            pool.flatten(0, 1)[slots] = newest.transpose(1, 2)

    def _take_blocks(self, rows: int | None) -> None:
        blocks = blocks_used(self.num_tokens, block=self._block, rows=rows)
        if blocks == self.blocks:
            return
        fallen_out = min(blocks.start - self.blocks.start, len(self.blocks))
        self._free.extend(self.table[:, :fallen_out].flatten().tolist())
        in_use = self.table[:, fallen_out:]
        batch, wanted = len(self.table), len(blocks) - in_use.shape[1]
        pool = batch * blocks_in_pool(self.num_tokens, block=self._block, rows=rows)
        there = len(self.key_pool)
        if pool > there:
            self._free.extend(range(there, pool))
            self.key_pool = _grown(self.key_pool, pool)
            self.value_pool = _grown(self.value_pool, pool)
        # One block for each sequence in turn: theirs lie between each other's.
        taken = [[self._free.popleft() for _ in range(batch)] for _ in range(wanted)]
        fresh = self.table.new_tensor(taken).reshape(wanted, batch).T
        self.table = torch.cat([in_use, fresh], dim=1)
        self.blocks = blocks

    def _gather(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `start` … `end` - 1, [batch, KV heads, tokens, width]."""
        slots = self._slots(start, end)[:, None]
        heads = torch.arange(self.key_pool.shape[2], device=slots.device)[:, None]
        keys, values = (
            pool.flatten(0, 1)[slots, heads] for pool in (self.key_pool, self.value_pool)
        )
        return keys, values

    def _slots(self, start: int, end: int) -> Tensor:
        """Where tokens `start` … `end` - 1 are among the rows of all blocks: [batch, tokens]."""
        tokens = torch.arange(start, end, device=self.table.device)
        columns = tokens // self._block - self.blocks.start
        return self.table[:, columns] * self._block + tokens % self._block


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache; its pools grow on demand, so that it needs no capacity."""
    del capacity_tokens
    return stored(config, PagedStorage, _block=parameters["block"])


def _empty_pool(states: Tensor, block: int) -> Tensor:
    _, heads, _, width = states.shape
    return states.new_empty(0, block, heads, width)


def _grown(pool: Tensor, blocks: int) -> Tensor:
    """The pool with room for `blocks` blocks; what is there is copied."""
    return torch.cat([pool, pool.new_empty(blocks - len(pool), *pool.shape[1:])])
