"""Triton kernels for one decode step over packed keys and values: split-KV attention after
FlashDecoding (https://pytorch.org/blog/flash-decoding/), with KIVI's dequantisation inside.

Imported only where Triton is; `_packed_attention` launches them. Shapes are those of `Packed`, all
tensors contiguous, batch and KV heads merged into one dimension `heads`; four bytes of levels are
one int32 word. Queries are columns here: a score is [tokens, queries].

Levels are attended to as they are. Of key = minimum + level × scale the scale is multiplied into
the query, of a value into the weight:

    score = Σ level × (scale × query) + Σ minimum × query
    output = Σ level × (scale × weight) + Σ minimum × weight

Levels of up to 8 bits, minima and queries are exact in bf16 and fp16. The first product goes to the
dot product in two parts, the second of which is what rounding the first left, so scores err by the
rounding of fp32; of scale × weight and weight half an ulp is lost: in an output at most half an ulp
of maximum - minimum, and of the minimum. Of random values around 1 a score lost more by rounding
the dequantised key.
"""

import triton
import triton.language as tl

from kvcalc.strategies._plain_kernels import LOG2_E


@triton.jit
def _swapped(rows):
    """Rows [rows, width], of every four channels the second and the third in each other's place."""
    quartets = tl.reshape(rows, (rows.shape[0], rows.shape[1] // 4, 2, 2))
    return tl.reshape(tl.permute(quartets, (0, 1, 3, 2)), rows.shape)


@triton.jit
def _levels(words, mask, BITS: tl.constexpr, dtype: tl.constexpr):
    """Words [rows, words] to levels [8 / BITS × rows, words, 2, 2]; the last two dimensions are
    the low and the high bit of a byte's place in its word, swapped as by `_swapped`.

    Two levels share 32 bits from the word to the dot product: shift, mask, or, subtract.
    """
    PLACES: tl.constexpr = 8 // BITS
    shifts = (tl.arange(0, PLACES) * BITS)[:, None] + (tl.arange(0, 2) * 8)[None, :]
    pairs = (words[None, :, :, None] >> shifts[:, None, None, :]) & mask
    # As the last bits of the significand of a power of two: 0x4303 is 131 in bf16.
    if dtype == tl.bfloat16 and BITS < 8:
        pairs |= 0x43004300
    elif dtype == tl.float16:
        pairs |= 0x64006400
    halves = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    if dtype == tl.bfloat16 and BITS < 8:
        levels = halves.to(tl.bfloat16, bitcast=True) - 128.0
    elif dtype == tl.float16:
        levels = halves.to(tl.float16, bitcast=True) - 1024.0
    else:
        # Not by a conversion of integers, of which an SM does a quarter as many.
        levels = (halves.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        levels = levels.to(dtype)
    return tl.reshape(levels, (PLACES * words.shape[0], 4 * words.shape[1]))


@triton.jit
def _weights(scores, most, total):
    """One block of the online softmax, of scores [tokens, queries] to the base 2, all fp32.

    Returns the weights, the new maximum, the new sums, which are added up over tokens at the end,
    and the factor of what was summed before.
    """
    new_most = tl.maximum(most, tl.max(scores, 0))
    decay = tl.exp2(most - new_most)
    weights = tl.exp2(scores - new_most[None, :])
    return weights, new_most, total * decay[None, :] + weights, decay[None, None, :]


@triton.jit(
    do_not_specialize=[
        "num_groups",
        "tail_tokens",
        "tail_splits",
        "groups_per_split",
        "tail_per_split",
        "level_mask",
    ]
)
def attend_splits(
    query,  # [heads, QUERIES, KEY_DIM]
    key_levels,  # int32 [heads, groups, ROWS, KEY_DIM / 4]
    key_scales,  # [heads, groups, KEY_DIM]
    key_minima,
    value_levels,  # int32 [heads, groups, ROWS, VALUE_DIM / 4]
    value_scales,  # [heads, groups × GROUP, PARTS]
    value_minima,
    tail_keys,  # [heads, tail, KEY_DIM]
    tail_values,  # [heads, tail, VALUE_DIM]
    partial,  # fp32 [heads, splits, QUERIES, VALUE_DIM], written
    logsumexp,  # fp32 [heads, splits, QUERIES], to the base 2, written
    scaling,
    num_groups,
    tail_tokens,
    tail_splits,
    groups_per_split,
    tail_per_split,
    level_mask,  # of two levels in a word: a constant would be copied before each use
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # of one KV head
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_QUERIES: tl.constexpr,  # powers of two, these three
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens, GROUP or a part of it
):
    """One split of one KV head: the attention of its queries to `tail_per_split` tokens of the tail
    (the first `tail_splits` splits) or to `groups_per_split` packed groups (the others).

    No split is empty. Tokens are met in the order of their bytes: softmax does not mind.
    """
    ROWS: tl.constexpr = GROUP * BITS // 8  # bytes of one channel of a group
    BLOCK_ROWS: tl.constexpr = BLOCK * BITS // 8
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PARTS: tl.constexpr = VALUE_DIM // GROUP
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)

    queries = tl.arange(0, PADDED_QUERIES)
    key_dims = tl.arange(0, PADDED_KEY_DIM)
    key_words = tl.arange(0, PADDED_KEY_DIM // 4)
    parts = tl.arange(0, PADDED_PARTS)
    value_dims = tl.arange(0, PADDED_PARTS * GROUP)
    value_words = tl.arange(0, PADDED_PARTS * GROUP // 4)
    tokens_in_block = tl.arange(0, BLOCK)
    rows_in_block = tl.arange(0, BLOCK_ROWS)
    states = tl.load(
        query + (head * QUERIES + queries[:, None]) * KEY_DIM + key_dims[None, :],
        mask=(queries < QUERIES)[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    )
    dtype: tl.constexpr = states.dtype
    scaling *= LOG2_E
    most = tl.full((PADDED_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, PADDED_QUERIES), tl.float32)
    output = tl.zeros((PADDED_PARTS, GROUP, PADDED_QUERIES), tl.float32)

    start = split * tail_per_split
    stop = tl.minimum(start + tail_per_split, tail_tokens)
    for first in tl.range(start, stop, BLOCK, num_stages=1):
        tokens = first + tokens_in_block
        seen = tokens < stop
        at = head * tail_tokens + tokens
        keys = tl.load(
            tail_keys + at[:, None] * KEY_DIM + key_dims[None, :],
            mask=seen[:, None] & (key_dims < KEY_DIM)[None, :],
            other=0.0,
        )
        values = tl.load(
            tail_values + at[:, None] * VALUE_DIM + value_dims[None, :],
            mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        values = tl.reshape(tl.trans(_swapped(values)), (PADDED_PARTS, GROUP, BLOCK))
        scores = tl.dot(keys, tl.trans(states), input_precision="ieee") * scaling
        scores = tl.where(seen[:, None], scores, float("-inf"))
        weights, most, total, decay = _weights(scores, most, total)
        weights = tl.broadcast_to(
            weights.to(dtype)[None, :, :], (PADDED_PARTS, BLOCK, PADDED_QUERIES)
        )
        output = tl.dot(values, weights, output * decay, input_precision="ieee")

    swapped_states = tl.trans(_swapped(states))
    start = tl.maximum(split - tail_splits, 0) * groups_per_split
    stop = tl.minimum((split - tail_splits + 1) * groups_per_split, num_groups)
    for block in range(start * BLOCKS, stop * BLOCKS):
        group = head * num_groups + block // BLOCKS
        first_row = (block % BLOCKS) * BLOCK_ROWS
        rows = group * ROWS + first_row + rows_in_block
        at = group * KEY_DIM + key_dims[None, :]
        key_mask = (key_dims < KEY_DIM)[None, :]
        scale = _swapped(tl.load(key_scales + at, mask=key_mask, other=0.0))
        minimum = _swapped(tl.load(key_minima + at, mask=key_mask, other=0.0))
        words = tl.load(
            key_levels + rows[:, None] * (KEY_DIM // 4) + key_words[None, :],
            mask=(key_words < KEY_DIM // 4)[None, :],
            other=0,
        )
        levels = _levels(words, level_mask, BITS, dtype)
        minimum = tl.broadcast_to(minimum, (BLOCK, PADDED_KEY_DIM))
        scores = tl.dot(minimum, swapped_states, input_precision="ieee")
        exact = swapped_states.to(tl.float32) * tl.trans(scale).to(tl.float32)
        scaled = exact.to(dtype)
        if dtype != tl.float32:
            rest = (exact - scaled.to(tl.float32)).to(dtype)
            scores = tl.dot(levels, rest, scores)
        scores = tl.dot(levels, scaled, scores, input_precision="ieee")
        weights, most, total, decay = _weights(scores * scaling, most, total)

        token = group * GROUP + first_row + tokens_in_block // BLOCK_ROWS * ROWS
        token += tokens_in_block % BLOCK_ROWS
        at = token[:, None] * PARTS + parts[None, :]
        part_mask = (parts < PARTS)[None, :]
        scale = tl.trans(tl.load(value_scales + at, mask=part_mask, other=0.0))
        minimum = tl.trans(tl.load(value_minima + at, mask=part_mask, other=0.0))
        words = tl.load(
            value_levels + rows[:, None] * (VALUE_DIM // 4) + value_words[None, :],
            mask=(value_words < VALUE_DIM // 4)[None, :],
            other=0,
        )
        levels = tl.reshape(_levels(words, level_mask, BITS, dtype), (BLOCK, PADDED_PARTS, GROUP))
        levels = tl.permute(levels, (1, 2, 0))
        minimum = tl.broadcast_to(minimum[:, None, :], (PADDED_PARTS, GROUP, BLOCK))
        scaled = (weights[None, :, :] * scale.to(tl.float32)[:, :, None]).to(dtype)
        weights = tl.broadcast_to(
            weights.to(dtype)[None, :, :], (PADDED_PARTS, BLOCK, PADDED_QUERIES)
        )
        output = tl.dot(minimum, weights, output * decay, input_precision="ieee")
        output = tl.dot(levels, scaled, output, input_precision="ieee")

    sums = tl.sum(total, 0)
    channels = tl.arange(0, GROUP)
    channels = channels // 4 * 4 + channels % 2 * 2 + channels // 2 % 2
    at = (head * tl.num_programs(1) + split) * QUERIES + queries
    tl.store(
        partial
        + at[None, None, :] * VALUE_DIM
        + parts[:, None, None] * GROUP
        + channels[None, :, None],
        output / sums[None, None, :],
        mask=(queries < QUERIES)[None, None, :] & (parts < PARTS)[:, None, None],
    )
    tl.store(logsumexp + at, most + tl.log2(sums), mask=queries < QUERIES)
