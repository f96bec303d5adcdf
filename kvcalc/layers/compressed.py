"""Compressed attention (DeepSeek-V4): a window of tokens, and one entry for each `rate` tokens."""

from dataclasses import dataclass, replace
from typing import Self

from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.layers import PlainLayer, Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttention(PlainLayer):
    """Rows of `entry_dim` values: of the last `window` tokens, and of each full stretch of `rate`.

    Until a stretch is full its tokens wait as projected values and gates, each `series` ×
    `entry_dim` wide. With two series stretches overlap: the first series of the last full stretch
    is kept, its gates in float32. `index_dim` values of an index key go the same way.

    `keeps_drained` says that the stretch that was just closed stays alive until the next token, as
    views do: then 1 to `rate` tokens wait, else 0 to `rate` - 1.
    """

    kind: str
    entry_dim: int
    index_dim: int
    rate: int
    window: int
    series: int
    keeps_drained: bool = False
    compute: StorageFormat | None = None

    def bind(self, setting: Setting) -> Self:
        """With the compute dtype, in which what waits is kept."""
        return replace(self, compute=setting.compute)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Window, entries, waiting tokens and overlap of each sequence."""
        width = self.entry_dim + self.index_dim
        entries = tokens // self.rate
        rows = min(tokens, self.window) * dtype.row_bytes(self.entry_dim)
        rows += entries * (dtype.row_bytes(self.entry_dim) + dtype.row_bytes(self.index_dim))
        state = self.compute or dtype
        waiting = self._waiting(tokens) * 2 * state.row_bytes(self.series * width)
        overlap = 0
        if self.series > 1 and entries:
            overlap = self.rate * (state.row_bytes(width) + FORMATS["fp32"].row_bytes(width))
        return batch * (rows + waiting + overlap)

    def _waiting(self, tokens: int) -> int:
        if self.keeps_drained and tokens:
            return (tokens - 1) % self.rate + 1
        return tokens % self.rate

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def shard(self, tp: int) -> Self:
        """Everything on every rank: there is one head."""
        del tp
        return self

    def keeps(self) -> str:
        """Widths, window and rate."""
        index = f" with an index key of {self.index_dim}" if self.index_dim else ""
        return f"{self.entry_dim} (K = V) in the window, and for {self.rate} tokens{index}"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The counts."""
        return (
            f"{self.keeps()}: min({tokens:,}, window {self.window:,}) rows + "
            f"{tokens // self.rate:,} entries of {dtype.name} + {self._waiting(tokens):,} waiting"
        )
