"""K and V in blocks of a pool, found through a table of each sequence's blocks (PagedAttention).

A layer's pool grows by whole blocks when its sequences need them. In a window layer a block whose
tokens have all fallen out of the window is free for the tokens that come. With blocks of 4 and
window 5 the next token attends to four before it (X has fallen out, . is still to come):

    6 tokens   [XXCD] [EF..]          two blocks in use
    8 tokens   [EFGH]                 the first is free
    9 tokens   [XFGH] [I...]          in use again

At most 1 + ceil((rows - 1) / block) blocks hold part of `rows` successive tokens, and as soon as a
sequence fills more than that many blocks less one, it has needed them all. The pool never shrinks,
so that it has min(ceil(tokens / block), 1 + ceil((window - 2) / block)) blocks a sequence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._rows import AttentionLayer, StoredRows, refuse_own_classes, window_of
from kvcalc.units import ceil_div

SUMMARY = "blocks of a pool that grows on demand, found through a block table"
SOURCE = "PagedAttention, arXiv:2309.06180, section 4"
WORKS_ON = "full-attention, window and latent layers; states and index keys stay as they are"
PARAMETERS: Mapping[str, int] = {"block": 16}
ABOUT = About(
    keeps="what dynamic keeps, in blocks of `block` tokens, and a table that says where they are",
    formula="ceil(tokens / block) blocks for each sequence and layer, of a window no more than "
    "1 + ceil((window - 2) / block), with 4 bytes of table each",
    evicts="nothing; blocks that fell out of a window are used again",
    needs="attention that finds rows through a table; here blocks are gathered at each step",
    limits="of one sequence it saves nothing: a server saves what it would reserve for tokens that "
    "never come, and what sequences share (not built here)",
    headlines=(
        Headline(
            "up to 24× the throughput of Hugging Face Transformers",
            "LLaMA-7B on an A10G, LLaMA-13B on an A100 (vLLM's launch post, June 2023)",
            "",
            "throughput of a server with many requests, no memory saved in a sequence",
        ),
        Headline(
            "2-4× the throughput of FasterTransformer and Orca",
            "at equal latency (abstract of the paper)",
            "",
            "throughput of a server with many requests",
        ),
        Headline(
            "less than 4% of memory wasted",
            "many requests at once (vLLM's launch post)",
            "",
            "a share of all that a server holds; of these sequences it is the figure `waste`",
        ),
    ),
)

COPIES = 1
"""A step makes a layer's rows once more, in one piece."""

ENTRY_BYTES = 4
"""The int32 of a block in a sequence's table."""


def blocks_used(tokens: int, *, block: int, rows: int | None) -> range:
    """Which of a sequence's blocks hold tokens that are still needed, counted from its start.

    `rows` is how many tokens the next one attends to at most, None for all.
    """
    fallen_out = 0 if rows is None else max(tokens - rows, 0)
    return range(fallen_out // block, ceil_div(tokens, block))


def blocks_in_pool(tokens: int, *, block: int, rows: int | None) -> int:
    """How many blocks a sequence of `tokens` tokens has ever used at a time."""
    filled = ceil_div(tokens, block)
    return filled if rows is None else min(filled, 1 + ceil_div(rows - 1, block))


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLayer(StoredRows):
    """A layer's pool of blocks and its block table."""

    kind: ClassVar[str] = "paged"
    block: int

    @property
    def rows_needed(self) -> int | None:
        """Tokens that the next one attends to at most, None for all."""
        window = window_of(self.layer)
        return None if window is None else window - 1

    def pool_tokens(self, tokens: int) -> int:
        """Tokens that a sequence's blocks have room for."""
        return self.block * blocks_in_pool(tokens, block=self.block, rows=self.rows_needed)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Whole blocks, and a table entry for each block in use."""
        entries = len(blocks_used(tokens, block=self.block, rows=self.rows_needed))
        rows_bytes = self.pool_tokens(tokens) * self.row_bytes(dtype)
        return batch * (rows_bytes + entries * ENTRY_BYTES)

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Blocks × their bytes, and the table."""
        blocks = self.pool_tokens(tokens) // self.block
        entries = len(blocks_used(tokens, block=self.block, rows=self.rows_needed))
        return (
            f"{blocks:,} blocks × {self.block} tokens × {self.keeps()} × {dtype.block_bytes} B "
            f"+ {entries:,} table entries × {ENTRY_BYTES} B"
        )


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """Rows of K and V in blocks; all else as it is. InputError for a block of no tokens."""
    block = parameters["block"]
    if block < 1:
        msg = f"paged: block must be at least 1, not {block}"
        raise InputError(msg)
    return PagedLayer(layer=layer, block=block) if isinstance(layer, AttentionLayer) else layer


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model with layers that cannot be replaced."""
    del parameters
    refuse_own_classes(layers, "paged")


def waste_bytes(
    layers: Iterable[Layer],
    parameters: Mapping[str, int],
    *,
    tokens: int,
    batch: int,
    dtype: StorageFormat,
) -> int:
    """Bytes of rows in the pools that hold no token which is still needed.

    `layers` are a model's as an engine lays them out.
    """
    return sum(
        batch * (paged.pool_tokens(tokens) - paged.tokens_kept(tokens)) * paged.row_bytes(dtype)
        for paged in _paged(layers, parameters)
    )


def figures(
    layers: Iterable[Layer],
    parameters: Mapping[str, int],
    *,
    tokens: int,
    batch: int,
    dtype: StorageFormat,
) -> dict[str, int]:
    """What of the pools is waste."""
    waste = waste_bytes(layers, parameters, tokens=tokens, batch=batch, dtype=dtype)
    return {"waste_bytes": waste}


def _paged(layers: Iterable[Layer], parameters: Mapping[str, int]) -> Iterator[PagedLayer]:
    for layer in layers:
        for part in layer.parts():
            stored = apply(part, parameters)
            if isinstance(stored, PagedLayer):
                yield stored
