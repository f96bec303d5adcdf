"""Triton kernels for one decode step over packed keys and values: split-KV attention after
FlashDecoding (https://pytorch.org/blog/flash-decoding/), with KIVI's dequantisation inside.

Imported only where Triton is; `_packed_attention` launches them. Shapes are those of `Packed`, all
tensors contiguous, batch and KV heads merged into one dimension `heads`.
"""

import triton
import triton.language as tl


@triton.jit
def _attend(scores, values, most, total, output):
    """One block of the online softmax: scores [queries, tokens] and values [tokens, channels] into
    the running maximum, sum [queries] and weighted sum [queries, channels], all fp32.
    """
    new_most = tl.maximum(most, tl.max(scores, 1))
    decay = tl.exp(most - new_most)
    weights = tl.exp(scores - new_most[:, None])
    total = total * decay + tl.sum(weights, 1)
    output = output * decay[:, None]
    output += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_most, total, output


@triton.jit(
    do_not_specialize=[
        "num_groups",
        "tail_tokens",
        "tail_splits",
        "groups_per_split",
        "tail_per_split",
    ]
)
def attend_splits(
    query,  # [heads, QUERIES, KEY_DIM]
    key_levels,  # uint8 [heads, groups, ROWS, KEY_DIM]
    key_scales,  # [heads, groups, KEY_DIM]
    key_minima,
    value_levels,  # uint8 [heads, groups, ROWS, VALUE_DIM]
    value_scales,  # [heads, groups × GROUP, VALUE_DIM / GROUP]
    value_minima,
    tail_keys,  # [heads, tail, KEY_DIM]
    tail_values,  # [heads, tail, VALUE_DIM]
    partial,  # fp32 [heads, splits, QUERIES, VALUE_DIM], written
    logsumexp,  # fp32 [heads, splits, QUERIES], written
    scaling,
    num_groups,
    tail_tokens,
    tail_splits,
    groups_per_split,
    tail_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # of one KV head
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_QUERIES: tl.constexpr,  # powers of two, these three
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr,  # VALUE_DIM / GROUP or more
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # of the tail
):
    """One split of one KV head: the attention of its queries to `tail_per_split` tokens of the tail
    (the first `tail_splits` splits) or to `groups_per_split` packed groups (the others).

    No split is empty. Tokens are met in the order of their bytes: softmax does not mind.
    """
    ROWS: tl.constexpr = GROUP * BITS // 8  # bytes of one channel of a group
    BLOCK_ROWS: tl.constexpr = BLOCK_GROUPS * ROWS
    PARTS: tl.constexpr = VALUE_DIM // GROUP
    PADDED_VALUE_DIM: tl.constexpr = PADDED_PARTS * GROUP
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)

    queries = tl.arange(0, PADDED_QUERIES)
    key_dims = tl.arange(0, PADDED_KEY_DIM)
    value_dims = tl.arange(0, PADDED_VALUE_DIM)
    states = tl.load(
        query + (head * QUERIES + queries[:, None]) * KEY_DIM + key_dims[None, :],
        mask=(queries < QUERIES)[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    )
    most = tl.full((PADDED_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_QUERIES,), tl.float32)
    output = tl.zeros((PADDED_QUERIES, PADDED_VALUE_DIM), tl.float32)

    start = split * tail_per_split
    stop = tl.minimum(start + tail_per_split, tail_tokens)
    for first in range(start, stop, BLOCK_TOKENS):
        tokens = first + tl.arange(0, BLOCK_TOKENS)
        seen = tokens < stop
        at = (head * tail_tokens + tokens)[:, None]
        keys = tl.load(
            tail_keys + at * KEY_DIM + key_dims[None, :],
            mask=seen[:, None] & (key_dims < KEY_DIM)[None, :],
            other=0.0,
        )
        values = tl.load(
            tail_values + at * VALUE_DIM + value_dims[None, :],
            mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(states, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        most, total, output = _attend(scores, values, most, total, output)

    start = tl.maximum(split - tail_splits, 0) * groups_per_split
    stop = tl.minimum((split - tail_splits + 1) * groups_per_split, num_groups)
    row_in_block = tl.arange(0, BLOCK_ROWS)
    row_in_group = tl.arange(0, ROWS)
    parts = tl.arange(0, PADDED_PARTS)
    channels = tl.arange(0, GROUP)
    for first in range(start, stop, BLOCK_GROUPS):
        # Keys as [groups, rows, channels], so that a group's scales are loaded once.
        groups = first + tl.arange(0, BLOCK_GROUPS)
        key_mask = (groups < stop)[:, None, None] & (key_dims < KEY_DIM)[None, None, :]
        at = (head * num_groups + groups)[:, None, None]
        key_scale = tl.load(
            key_scales + at * KEY_DIM + key_dims[None, None, :], mask=key_mask, other=0.0
        ).to(tl.float32)
        key_minimum = tl.load(
            key_minima + at * KEY_DIM + key_dims[None, None, :], mask=key_mask, other=0.0
        ).to(tl.float32)
        key_bytes = tl.load(
            key_levels
            + (at * ROWS + row_in_group[None, :, None]) * KEY_DIM
            + key_dims[None, None, :],
            mask=key_mask,
            other=0,
        )
        # Values as [rows, parts, channels of a part], likewise.
        group_of_row = first + row_in_block // ROWS
        seen = group_of_row < stop
        part_mask = seen[:, None] & (parts < PARTS)[None, :]
        at = (head * num_groups * ROWS + first * ROWS + row_in_block)[:, None, None]
        value_bytes = tl.load(
            value_levels + at * VALUE_DIM + parts[None, :, None] * GROUP + channels[None, None, :],
            mask=part_mask[:, :, None],
            other=0,
        )
        for place in tl.static_range(8 // BITS):
            levels = (key_bytes >> (place * BITS)) & (2**BITS - 1)
            keys = (key_minimum + levels.to(tl.float32) * key_scale).to(states.dtype)
            keys = tl.reshape(keys, (BLOCK_ROWS, PADDED_KEY_DIM))
            scores = tl.dot(states, tl.trans(keys), input_precision="ieee") * scaling
            scores = tl.where(seen[None, :], scores, float("-inf"))

            token = group_of_row * GROUP + place * ROWS + row_in_block % ROWS
            at = (head * num_groups * GROUP + token)[:, None] * PARTS + parts[None, :]
            scale = tl.load(value_scales + at, mask=part_mask, other=0.0).to(tl.float32)
            minimum = tl.load(value_minima + at, mask=part_mask, other=0.0).to(tl.float32)
            levels = (value_bytes >> (place * BITS)) & (2**BITS - 1)
            values = minimum[:, :, None] + levels.to(tl.float32) * scale[:, :, None]
            values = tl.reshape(values.to(states.dtype), (BLOCK_ROWS, PADDED_VALUE_DIM))
            most, total, output = _attend(scores, values, most, total, output)

    at = (head * tl.num_programs(1) + split) * QUERIES + queries
    tl.store(
        partial + at[:, None] * VALUE_DIM + value_dims[None, :],
        output / total[:, None],
        mask=(queries < QUERIES)[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
    tl.store(logsumexp + at, most + tl.log(total), mask=queries < QUERIES)


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits(
    partial,  # fp32 [heads, splits, QUERIES, VALUE_DIM]
    logsumexp,  # fp32 [heads, splits, QUERIES]
    result,  # [heads, QUERIES, VALUE_DIM], written
    num_splits,
    QUERIES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One query of one KV head: its splits, each weighted by the sum of its exponentials."""
    head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1)
    dims = tl.arange(0, PADDED_VALUE_DIM)
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    output = tl.zeros((PADDED_VALUE_DIM,), tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        seen = splits < num_splits
        at = (head * num_splits + splits) * QUERIES + query
        logs = tl.load(logsumexp + at, mask=seen, other=float("-inf"))
        outputs = tl.load(
            partial + at[:, None] * VALUE_DIM + dims[None, :],
            mask=seen[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_most = tl.maximum(most, tl.max(logs, 0))
        decay = tl.exp(most - new_most)
        weights = tl.exp(logs - new_most)
        total = total * decay + tl.sum(weights, 0)
        output = output * decay + tl.sum(weights[:, None] * outputs, 0)
        most = new_most
    tl.store(
        result + (head * QUERIES + query) * VALUE_DIM + dims,
        (output / total).to(result.dtype.element_ty),
        mask=dims < VALUE_DIM,
    )
