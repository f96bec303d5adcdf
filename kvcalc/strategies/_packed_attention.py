"""Attention of one new token to packed keys and values, without dequantising them in memory.

On CUDA with Triton a decode step reads the packed levels, scales and minima themselves, a quarter
of what a full cache reads at 4 bits (split-KV attention, see `_packed_kernels`). Anywhere else, and
for any attention that is more than softmax(q·k)·v over all tokens, the same tensors are dequantised
and the plain attention runs, as without this file.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from kvcalc.strategies import _plain_attention
from kvcalc.strategies._plain_attention import (
    MOST_WIDTH,
    SMALLEST_DOT,
    StandIn,
    attends_by_sdpa,
    causal_mask,
    combine,
    in_place_of_sdpa,
    next_power_of_2,
)
from kvcalc.units import ceil_div

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

    from kvcalc.strategies._packed_cache import Packed

CHANGES_NOTHING = frozenset({"cache_position", "is_causal", "position_ids", "use_cache"})
"""Arguments of an attention function that say nothing to one token which sees all others."""

QUERY_COLUMNS = 8
"""Columns of the smallest tensor core product; fewer queries of a KV head are padded."""

BLOCK_TOKENS = 32
"""Tokens a program takes at a time, at most: one group of the usual size."""

WARP_ELEMENTS = 1024
"""Elements of the output, queries × channels of V, for which a warp has registers."""

STAGES = 2
"""Blocks in flight, one computed and one loaded; there are some 8 programs on a multiprocessor."""

FEWEST_TOKENS_PER_SPLIT, MOST_PROGRAMS = 64, 1024
"""Splits are as short as gives this many programs over all heads, 8 for each of the 132
multiprocessors of an H100 or H200: as many as run at the same time.
"""


class PackedTokens(StandIn):
    """Keys or values of all tokens [batch, KV heads, tokens, width]: packed groups and the tail."""

    packed: "Packed"
    tail: Tensor
    bits: int

    def __new__(cls, packed: "Packed", tail: Tensor, bits: int) -> Self:
        """Without a storage of its own, of the shape and dtype it stands for."""
        batch, heads, tokens, width = tail.shape
        tokens += packed.levels.shape[2] * group_tokens(packed, bits)
        made: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, (batch, heads, tokens, width), dtype=tail.dtype, device=tail.device
        )
        made.packed, made.tail, made.bits = packed, tail, bits
        return made

    def made(self) -> Tensor:
        """The tokens dequantised."""
        return dequantised(self.packed, self.tail, self.bits)


def dequantised(packed: "Packed", tail: Tensor, bits: int) -> Tensor:
    """Packed tokens and the tail after them, [batch, KV heads, tokens, width]."""
    return torch.cat([packed.states(bits), tail], dim=2)


def group_tokens(packed: "Packed", bits: int) -> int:
    """Tokens of one group."""
    return packed.levels.shape[3] * 8 // bits


def is_active() -> bool:
    """Whether models attend through `attention` now."""
    return _active


@contextmanager
def use_fused(model: "PreTrainedModel") -> Iterator[Counter[str]]:
    """Let the model attend through `attention` where it used `sdpa` and the kernel can run, else as
    without a packed cache.

    Yields the calls so far by what answered them; it stays empty where nothing is replaced.
    """
    global _active  # noqa: PLW0603 - as are the functions that models look up
    with _plain_attention.attending(model) as calls:
        if not (_plain_attention.fused_available(model.device) and attends_by_sdpa(model)):
            yield calls
            return
        with in_place_of_sdpa(attention, causal_mask):
            _active = True
            try:
                yield calls
            finally:
                _active = False


_active = False


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401 - transformers' signature
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [batch, heads, tokens, width] to an output
    [batch, tokens, heads, width].

    Fused for one token, PackedTokens and plain attention to all of them; else the plain attention.
    """
    unusual = any(
        argument is not None and argument is not False
        for name, argument in kwargs.items()
        if name not in CHANGES_NOTHING
    )
    if (
        isinstance(key, PackedTokens)
        and isinstance(value, PackedTokens)
        and attention_mask is None
        and not dropout
        and not unusual
        and fits(query, key, value)
    ):
        _plain_attention.calls["fused"] += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, scaling=scale), None
    key, value = (one.made() if isinstance(one, PackedTokens) else one for one in (key, value))
    return _plain_attention.attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def fits(query: Tensor, key: PackedTokens, value: PackedTokens) -> bool:
    """Whether `attend` takes these shapes: one token, whole groups of heads, a group of 16 tokens,
    32, 64 and so on, and heads that are not too wide, of whole words.
    """
    group = group_tokens(key.packed, key.bits)
    return (
        query.shape[2] == 1
        and query.shape[1] % key.shape[1] == 0
        and key.shape[:3] == value.shape[:3]
        and query.dtype == key.dtype
        and group >= SMALLEST_DOT
        and group & (group - 1) == 0
        and key.shape[3] % 4 == 0
        and 0 < key.shape[3] <= MOST_WIDTH
        and 0 < value.shape[3] <= MOST_WIDTH
    )


class Splits(NamedTuple):
    """How the tokens of a head are dealt out: `tail` splits of `tail_tokens` tokens, then `packed`
    splits of `groups` groups; the last of each may be shorter.
    """

    tail: int
    tail_tokens: int
    packed: int
    groups: int


def split_tokens(*, tail: int, groups: int, group: int, heads: int) -> Splits:
    """Splits of `tail` tokens and `groups` groups of `group` tokens, for `heads` KV heads in all
    sequences together: MOST_PROGRAMS and one more for each head at most, or one or two a head.
    """
    per_head = max(MOST_PROGRAMS // heads, 1)
    wanted = max(FEWEST_TOKENS_PER_SPLIT, ceil_div(tail + groups * group, per_head))
    groups_per_split = ceil_div(wanted, group)
    return Splits(
        ceil_div(tail, wanted), wanted, ceil_div(groups, groups_per_split), groups_per_split
    )


def constants(
    *, bits: int, group: int, queries: int, key_dim: int, value_dim: int, element_bytes: int
) -> dict[str, int]:
    """What the kernel `attend_splits` is compiled for, and with how many warps and stages.

    A decode step must read 160 bytes for a token of a KV head with 4 bits, width 128, group 32 and
    bf16. An H200 copies 4.3 TB/s, 16.5 bytes a cycle and multiprocessor at 1.98 GHz, and issues 4
    instructions of a warp in that cycle: 39 for each token, before they take longer than the bytes.
    One warp for a whole block of 32 tokens needs 38. Two need 51, for they exchange what they
    share, four 87 (benchmarks/compiled_kernels.py). 8 bits need 60 and may take 70; 2 bits 37 of
    23, so they are bound by the instructions. A warp has registers for WARP_ELEMENTS of the output
    beside its block; fp32, without tensor cores for it, needs four times the warps.
    """
    padded_queries = max(next_power_of_2(queries), QUERY_COLUMNS)
    padded_parts = next_power_of_2(value_dim // group)
    padded_key_dim = max(next_power_of_2(key_dim), SMALLEST_DOT)
    elements = padded_queries * max(padded_key_dim, padded_parts * group)
    warps = max(elements // WARP_ELEMENTS, 1) * (1 if element_bytes == 2 else 4)
    return {
        "BITS": bits,
        "GROUP": group,
        "QUERIES": queries,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "PADDED_QUERIES": padded_queries,
        "PADDED_KEY_DIM": padded_key_dim,
        "PADDED_PARTS": padded_parts,
        "BLOCK": min(group, BLOCK_TOKENS if element_bytes == 2 else SMALLEST_DOT),
        "num_warps": min(warps, 8),
        "num_stages": STAGES,
        "enable_fp_fusion": True,
    }


def attend(
    query: Tensor,
    key: PackedTokens,
    value: PackedTokens,
    *,
    scaling: float,
    settings: Mapping[str, int] | None = None,
) -> Tensor:
    """Attention of one token of each sequence, query [batch, heads, 1, width], by the kernels.

    Returns [batch, 1, heads, width of V]. There must be a token, packed or not. A benchmark changes
    some of the kernel's `constants` by `settings`: BLOCK, num_warps, num_stages.
    """
    from kvcalc.strategies import _packed_kernels as kernels

    batch, num_heads = query.shape[:2]
    kv_heads, groups = key.packed.levels.shape[1:3]
    heads, queries = batch * kv_heads, num_heads // kv_heads
    key_dim, value_dim, tail = key.shape[3], value.shape[3], key.tail.shape[2]
    bits, group = key.bits, group_tokens(key.packed, key.bits)
    splits = split_tokens(tail=tail, groups=groups, group=group, heads=heads)
    num_splits = splits.tail + splits.packed
    shape = (heads, num_splits, queries)
    partial = torch.empty((*shape, value_dim), dtype=torch.float32, device=query.device)
    logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    result = torch.empty((batch, 1, num_heads, value_dim), dtype=query.dtype, device=query.device)
    compiled_for = constants(
        bits=bits,
        group=group,
        queries=queries,
        key_dim=key_dim,
        value_dim=value_dim,
        element_bytes=query.element_size(),
    )
    with torch.cuda.device_of(query):
        kernels.attend_splits[heads, num_splits](
            query.contiguous(),
            *_contiguous(key.packed),
            *_contiguous(value.packed),
            key.tail.contiguous(),
            value.tail.contiguous(),
            partial,
            logsumexp,
            scaling,
            groups,
            tail,
            splits.tail,
            splits.groups,
            splits.tail_tokens,
            0x10001 * (2**bits - 1),
            **compiled_for | dict(settings or {}),
        )
        combine(partial, logsumexp, result)
    return result


def _contiguous(packed: "Packed") -> tuple[Tensor, Tensor, Tensor]:
    """Levels, four to eight in an int32, scales and minima."""
    levels = packed.levels.contiguous().view(torch.int32)
    return levels, packed.scales.contiguous(), packed.minima.contiguous()
