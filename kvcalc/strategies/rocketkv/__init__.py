"""RocketKV (arXiv:2502.14051): a SnapKV cache that is larger than what a decode step reads of it.

A token budget b is what a step may read. Of a prompt of N tokens, `capacity` are kept; a step reads
an index of them, as much as b / 2 tokens, and then the rows of the b / 2 tokens that it points to.

    c = N / b      capacity = N / c^min(0.2 + 0.06 log2 c, 0.8)
    d = capacity / b      chunk = min(floor d, ceil √d)      channels = width × chunk / d

The index has for every chunk of kept tokens the least and the largest value of each channel of
their keys. A step reads the channels in which its query is largest, and of each just one of the
two: channels / chunk = width / d values for a token, which for all of them is width × b.

Written from the description of the method; the reference code's licence is not ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import NamedTuple

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import UnsupportedError
from kvcalc.layers import LatentAttention, Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._evicted import EvictedLayer, check_evictable, check_window, evicted
from kvcalc.strategies._parameters import Budget, Pooling, Value
from kvcalc.units import ceil_div

SUMMARY = "a SnapKV cache with an index, by which each step reads part of it"
SOURCE = "RocketKV, arXiv:2502.14051 (ICML 2025)"
WORKS_ON = "full-attention layers; windows and states stay as they are"
PARAMETERS: Mapping[str, Value] = {
    "budget": Budget(256),
    "window": 32,
    "kernel": 63,
    "pooling": Pooling.MAX,
}
ABOUT = About(
    keeps="more tokens than the budget by SnapKV, and of every chunk of them the least and the "
    "largest value of each channel of the keys",
    formula="capacity + decoded rows for each KV head, and 2 × ceil(rows / chunk) × key width; no "
    "index where a chunk is one token, whose key is its own",
    evicts="once, when the prompt is there; a decode step reads budget / 2 tokens, and drops none",
    needs="attention of the last `window` queries; in each step a gather",
    limits="what saves traffic takes gathers, which are slow without a kernel of their own; the "
    "query heads of a KV head share its tokens, and which bound of a channel is read",
    headlines=(
        Headline(
            "up to 400× compression",
            "102,400 tokens, token budget 256",
            "",
            "prompt over token budget, which is what a step reads; the storage there is 55.6×",
        ),
        Headline("32.6% less peak memory", "Llama-3.1-8B, A100, batch 1, while decoding", "peak"),
        Headline("up to 3.7× faster decoding", "Llama-3.1-8B, A100, batch 1", "tpot"),
    ),
)

WHOLE_PROMPT = ALTERS = True


class Split(NamedTuple):
    """A token budget, split: rows kept of a prompt, tokens in a chunk, tokens that a step reads."""

    capacity: int
    chunk: int
    tokens: int
    budget: int

    @classmethod
    def of(cls, budget_tokens: int, prompt_tokens: int) -> "Split":
        """See the module; no less than a chunk of one token, a token read, a channel."""
        ratio = prompt_tokens / budget_tokens
        capacity = prompt_tokens
        if ratio > 1:
            capacity = int(prompt_tokens / ratio ** min(0.2 + 0.06 * log2(ratio), 0.8))
        depth = capacity / budget_tokens
        chunk = max(min(int(depth), ceil(sqrt(depth))), 1)
        return cls(capacity, chunk, max(budget_tokens // 2, 1), budget_tokens)

    def channels(self, width: int) -> int:
        """How many channels of keys of this width a step reads of the index."""
        return min(max(round(width * self.chunk * self.budget / self.capacity), 1), width)

    def index_entries(self, rows: int) -> int:
        """Chunks of `rows` tokens, the last one as it is; none where each would be one token."""
        return ceil_div(rows, self.chunk) if self.chunk > 1 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedLayer(EvictedLayer):
    """The rows that `Split` keeps, and their index."""

    def split(self, prompt_tokens: int) -> Split:
        """The budget's."""
        return Split.of(self.budget.of(prompt_tokens), prompt_tokens)

    def kept_of_prompt(self, prompt_tokens: int) -> int:
        """The capacity."""
        capacity = self.split(prompt_tokens).capacity
        if capacity < prompt_tokens:
            check_window(self.name, budget_tokens=capacity, window=self.window)
        return capacity

    def entry_bytes(self, dtype: StorageFormat) -> int:
        """Both bounds of one chunk's keys."""
        heads, key_dim, _ = self.layer.rows()
        return dtype.row_bytes(2 * heads * key_dim)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Rows and index."""
        entries = batch * self._entries(tokens)
        rows = EvictedLayer.num_bytes(self, tokens=tokens, batch=batch, dtype=dtype)
        return rows + entries * self.entry_bytes(dtype)

    def step_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """What a decode step reads when `tokens` tokens are there: one bound of the channels that
        it looks at, and the rows that it chooses.
        """
        prompt, _ = self._split(tokens)
        split, kept = self.split(prompt), self.tokens_kept(tokens)
        heads, key_dim, _ = self.layer.rows()
        chosen = self.stored.num_bytes(tokens=min(kept, split.tokens), batch=batch, dtype=dtype)
        if kept <= split.tokens:
            return chosen
        looked_at = ceil_div(kept, split.chunk) * heads * split.channels(key_dim)
        return chosen + batch * dtype.row_bytes(looked_at)

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """The index besides."""
        formula = EvictedLayer.formula(self, tokens=tokens, dtype=dtype)
        return f"{formula}; index of {self._entries(tokens):,} × {self.entry_bytes(dtype)} B"

    def _entries(self, tokens: int) -> int:
        prompt, _ = self._split(tokens)
        return self.split(prompt).index_entries(self.tokens_kept(tokens))


def apply(layer: Layer, parameters: Mapping[str, Value]) -> Layer:
    """The capacity of a prompt, all that is decoded, and the index."""
    return evicted("rocketkv", layer, parameters, grows=True, kind=IndexedLayer)


def check(layers: Sequence[Layer], parameters: Mapping[str, Value]) -> None:
    """Raise UnsupportedError for a model with nothing to evict, or with latents."""
    del parameters
    check_evictable("rocketkv", layers)
    if any(isinstance(part, LatentAttention) for layer in layers for part in layer.parts()):
        msg = (
            "rocketkv indexes keys as queries meet them; latents are expanded to other keys for "
            "each head; use snapkv"
        )
        raise UnsupportedError(msg)


def figures(
    layers: Iterable[Layer],
    parameters: Mapping[str, Value],
    *,
    tokens: int,
    batch: int,
    dtype: StorageFormat,
) -> dict[str, int]:
    """What a decode step reads of the cache, of layers that are not indexed all: `traffic_bytes`.

    `tokens` count as a prompt where the layers are not bound to the length of one.
    """
    parts = [apply(part, parameters) for layer in layers for part in layer.parts()]
    traffic_bytes = sum(
        part.step_bytes(tokens=tokens, batch=batch, dtype=dtype)
        if isinstance(part, IndexedLayer)
        else part.num_bytes(tokens=tokens, batch=batch, dtype=dtype)
        for part in parts
    )
    return {"traffic_bytes": traffic_bytes}
