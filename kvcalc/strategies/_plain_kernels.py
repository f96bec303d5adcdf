"""Triton kernels for one decode step over rows that are filled up to a counter on the device:
split-KV attention after FlashDecoding (https://pytorch.org/blog/flash-decoding/).

Imported only where Triton is; `_plain_attention` launches them. The grid follows from the capacity,
so that a CUDA graph can repeat them while the counter grows. Batch and KV heads are merged into one
dimension `heads`; K and V are read where they are.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Softmax to the base 2 is the same, of scores that are multiplied by this."""


@triton.jit(do_not_specialize=["kv_heads", "split_tokens"])
def attend_splits(
    query,  # [heads, QUERIES, KEY_DIM], contiguous
    keys,  # [batch, KV heads, capacity, KEY_DIM], a row contiguous
    values,  # [batch, KV heads, capacity, VALUE_DIM], likewise
    counter,  # int64: how many of the rows are tokens
    partial,  # fp32 [heads, splits, QUERIES, VALUE_DIM], written
    logsumexp,  # fp32 [heads, splits, QUERIES], to the base 2, written
    scaling,
    kv_heads,
    split_tokens,
    key_of_batch,  # strides in elements
    key_of_head,
    key_of_token,
    value_of_batch,
    value_of_head,
    value_of_token,
    QUERIES: tl.constexpr,  # of one KV head
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_QUERIES: tl.constexpr,  # powers of two, these four
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One split of one KV head: the attention of its queries to `split_tokens` tokens, fewer in the
    last. A split beyond the counter writes nothing.
    """
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * split_tokens
    num_tokens = tl.load(counter).to(tl.int32)
    if start >= num_tokens:
        return
    stop = tl.minimum(start + split_tokens, num_tokens)
    scaling *= LOG2_E
    keys += head // kv_heads * key_of_batch + head % kv_heads * key_of_head
    values += head // kv_heads * value_of_batch + head % kv_heads * value_of_head

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
    for first in range(start, stop, BLOCK_TOKENS):
        tokens = first + tl.arange(0, BLOCK_TOKENS)
        seen = tokens < stop
        at = tokens.to(tl.int64)[:, None]
        block = tl.load(
            keys + at * key_of_token + key_dims[None, :],
            mask=seen[:, None] & (key_dims < KEY_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(states, tl.trans(block), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        block = tl.load(
            values + at * value_of_token + value_dims[None, :],
            mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_most = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp2(most - new_most)
        weights = tl.exp2(scores - new_most[:, None])
        total = total * decay + tl.sum(weights, 1)
        output = output * decay[:, None]
        output += tl.dot(weights.to(block.dtype), block, input_precision="ieee")
        most = new_most

    at = (head * tl.num_programs(1) + tl.program_id(1)) * QUERIES + queries
    tl.store(
        partial + at[:, None] * VALUE_DIM + value_dims[None, :],
        output / total[:, None],
        mask=(queries < QUERIES)[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
    tl.store(logsumexp + at, most + tl.log2(total), mask=queries < QUERIES)


@triton.jit(do_not_specialize=["num_splits", "split_tokens"])
def combine_splits(
    partial,  # fp32 [heads, splits, QUERIES, VALUE_DIM]
    logsumexp,  # fp32 [heads, splits, QUERIES], to the base 2
    counter,  # int64: how many tokens there are, where COUNTED
    result,  # [heads, QUERIES, VALUE_DIM], written
    num_splits,
    split_tokens,
    COUNTED: tl.constexpr,  # whether splits beyond the counter are empty
    QUERIES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """`BLOCK_DIM` channels of one query of one KV head: its splits, each weighted by the sum of its
    exponentials.
    """
    head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    written = num_splits
    if COUNTED:
        written = tl.cdiv(tl.load(counter).to(tl.int32), split_tokens)
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    output = tl.zeros((BLOCK_DIM,), tl.float32)
    for first in range(0, written, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        seen = splits < written
        at = (head * num_splits + splits) * QUERIES + query
        logs = tl.load(logsumexp + at, mask=seen, other=float("-inf"))
        outputs = tl.load(
            partial + at[:, None] * VALUE_DIM + dims[None, :],
            mask=seen[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_most = tl.maximum(most, tl.max(logs, 0))
        decay = tl.exp2(most - new_most)
        weights = tl.exp2(logs - new_most)
        total = total * decay + tl.sum(weights, 0)
        output = output * decay + tl.sum(weights[:, None] * outputs, 0)
        most = new_most
    tl.store(
        result + (head * QUERIES + query) * VALUE_DIM + dims,
        (output / total).to(result.dtype.element_ty),
        mask=dims < VALUE_DIM,
    )
