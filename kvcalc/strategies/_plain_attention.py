"""Attention of new tokens to all tokens before, without making the mask that says so.

transformers hands SDPA a mask for a later piece of a prompt and for each step of a static cache:
flash attention takes none, K and V are repeated to all query heads, and a step goes over the whole
capacity. Here that mask is a `CausalMask`, which only says what it stands for, and `attention` goes
over the rows that are filled: with a piece of a prompt by a kernel that knows the lower-right
triangle, with a step of a static cache by one that reads their number on the device (see
`_plain_kernels`), so that a CUDA graph can repeat it. Whatever else sees the mask gets it made.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcalc.releases import has_triton
from kvcalc.units import ceil_div

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

HARMLESS = frozenset({"cache_position", "is_causal", "position_ids", "sliding_window", "use_cache"})
"""Arguments of an attention function that `sdpa` does not look at beside a mask."""

MOST_WIDTH = 256
"""Channels of a head up to which a block of a kernel fits into registers."""

SMALLEST_DOT = 16
"""Rows and channels that a Triton dot product must have."""

FEWEST_TOKENS_PER_SPLIT, MOST_PROGRAMS, SPLIT_MULTIPLE = 128, 1024, 64
"""Splits are as short as gives this many programs over all heads, some 8 for each multiprocessor of
an H200 or A100, and whole blocks of the kernel.
"""

COMBINED_SPLITS, COMBINED_CHANNELS = 256, 32
"""What a program that combines splits reads at a time, of one query."""


class StandIn(Tensor):
    """A tensor without a storage that knows what it stands for: whatever computes with it gets that
    `made`, and only a function of ours looks at what is inside.
    """

    # torch's way to have __torch_dispatch__ alone, so that shapes are looked up without it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run an operation on what is stood for."""
        del types
        args, kwargs = tree_map_only(StandIn, lambda one: one.made(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def made(self) -> Tensor:
        """What it stands for, as an ordinary tensor."""
        raise NotImplementedError


class CausalMask(StandIn):
    """A mask [batch, 1, new tokens, rows] of which query i sees the first `visible` - new tokens
    + i + 1 rows.

    `visible`, the rows that the last query sees, is on the device where it is counted there.
    """

    visible: int | Tensor
    _made: Tensor | None

    def __new__(cls, shape: tuple[int, int, int, int], visible: int | Tensor, device: Any) -> Self:  # noqa: ANN401
        """Without a storage of its own."""
        mask: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, shape, dtype=torch.bool, device=device
        )
        mask.visible, mask._made = visible, None
        return mask

    def made(self) -> Tensor:
        """The mask as an ordinary tensor, made once."""
        if self._made is None:
            batch, _, new, rows = self.shape
            last = torch.arange(new, device=self.device)[:, None] + (self.visible - new)
            mask = torch.arange(rows, device=self.device) <= last
            self._made = mask.expand(batch, 1, new, rows)
        return self._made


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # noqa: ANN401 - int, or int64 on the device
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,  # noqa: ANN401
    attention_mask: Tensor | None = None,
    device: Any = "cpu",  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Tensor | None:
    """A mask function of transformers: a CausalMask where tokens came before and nothing but the
    order of tokens is masked, else what `sdpa_mask` makes.

    A piece of a prompt reads an offset on the device, as `sdpa_mask` does; a step does not.
    """
    plain = mask_function is causal_mask_function and attention_mask is None and kv_offset == 0
    shape = (batch_size, 1, q_length, kv_length)
    if plain and q_length == 1 and isinstance(q_offset, Tensor):
        # A copy: the cache counts its own tensor up before attention comes.
        return CausalMask(shape, q_offset + 1, device)
    if plain and q_length > 1:
        q_offset = int(q_offset)
        if 0 < q_offset <= kv_length - q_length:
            return CausalMask(shape, q_offset + q_length, device)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    return mask


calls: Counter[str] = Counter()


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

    Plain attention under a CausalMask goes its own way; else `sdpa`, unchanged.
    """
    if isinstance(attention_mask, CausalMask):
        visible = attention_mask.visible
        unusual = dropout or any(
            argument is not None and argument is not False
            for name, argument in kwargs.items()
            if name not in HARMLESS
        )
        if not unusual and attention_mask.shape[2:] == (query.shape[2], key.shape[2]):
            if isinstance(visible, int):
                keys, values = key[:, :, :visible], value[:, :, :visible]
                return attend_lower_right(query, keys, values, scaling=scaling), None
            if fused_available(query.device) and fits(query, key, value):
                calls["fused"] += 1
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                return attend(query, key, value, visible, scaling=scale), None
        attention_mask = attention_mask.made()
    flash = attention_mask is None and flash_takes(query, key, value)
    calls["flash" if flash else "sdpa"] += 1
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


@cache
def fused_available(device: torch.device) -> bool:
    """Whether kernels of ours can run there: CUDA with bf16 tensor cores, and Triton."""
    return has_flash(device) and has_triton()


@cache
def has_flash(device: torch.device) -> bool:
    """Whether torch has flash attention for this device: CUDA with bf16 tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention, which has no mask and needs no repeated K and V, takes these."""
    return (
        has_flash(query.device)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] == key.shape[3] == value.shape[3] <= MOST_WIDTH
    )


def attend_lower_right(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
) -> Tensor:
    """Attention of the last tokens [batch, heads, tokens, width] to all rows before and at their
    own: [batch, tokens, heads, width of V].

    The mask is made on CPUs only, and for shapes that neither flash nor efficient attention takes.
    """
    flash = flash_takes(query, key, value)
    calls["flash" if flash else "sdpa"] += 1
    if not flash:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Made for no tokens: torch allocates twice the mask in floats for one that it never reads.
    bias: Any = causal_lower_right(0, 0)
    bias.seq_len_q, bias.seq_len_kv = query.shape[2], key.shape[2]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=flash
    )
    return output.transpose(1, 2).contiguous()


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these shapes: whole groups of heads, one dtype, rows of one piece, and
    heads that are not too wide.
    """
    return (
        query.shape[2] == 1
        and query.shape[1] % key.shape[1] == 0
        and key.shape[:3] == value.shape[:3]
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and key.stride(3) == value.stride(3) == 1
        and max(key.shape[3], value.shape[3]) <= MOST_WIDTH
    )


def split_tokens(*, capacity: int, heads: int) -> int:
    """Tokens of one split, for `heads` KV heads in all sequences together."""
    wanted = max(FEWEST_TOKENS_PER_SPLIT, capacity * heads // MOST_PROGRAMS)
    return -(-wanted // SPLIT_MULTIPLE) * SPLIT_MULTIPLE


def constants(*, queries: int, key_dim: int, value_dim: int, element_bytes: int) -> dict[str, int]:
    """What the kernel `attend_splits` is compiled for, and with how many warps and stages.

    For sm_90, bf16 and width 128 that are 80 to 86 registers and 70 KiB of shared memory, and 25
    instructions a token and KV head of the 124 that can be issued while its bytes are read
    (benchmarks/compiled_kernels.py): three programs on a multiprocessor, with 64 KiB each on their
    way. In fp32, and for wider heads, a block of as many tokens has too few registers.
    """
    block_tokens = 16 if element_bytes == 4 else 32 if max(key_dim, value_dim) > 128 else 64
    return {
        "QUERIES": queries,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "PADDED_QUERIES": max(next_power_of_2(queries), SMALLEST_DOT),
        "PADDED_KEY_DIM": max(next_power_of_2(key_dim), SMALLEST_DOT),
        "PADDED_VALUE_DIM": max(next_power_of_2(value_dim), SMALLEST_DOT),
        "BLOCK_TOKENS": block_tokens,
        "num_warps": 4,
        "num_stages": 3,
    }


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number > 0."""
    return 1 << (number - 1).bit_length()


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float) -> Tensor:
    """Attention of one token of each sequence, query [batch, heads, 1, width], to the first
    `visible` rows, an int64 on the device that must be 1 or more, by the kernels.

    Returns [batch, 1, heads, width of V].
    """
    from kvcalc.strategies import _plain_kernels as kernels

    batch, num_heads = query.shape[:2]
    kv_heads, capacity, key_dim = key.shape[1:]
    heads, queries, value_dim = batch * kv_heads, num_heads // kv_heads, value.shape[3]
    per_split = split_tokens(capacity=capacity, heads=heads)
    num_splits = -(-capacity // per_split)
    shape = (heads, num_splits, queries)
    partial = torch.empty((*shape, value_dim), dtype=torch.float32, device=query.device)
    logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    result = torch.empty((batch, 1, num_heads, value_dim), dtype=query.dtype, device=query.device)
    compiled_for = constants(
        queries=queries, key_dim=key_dim, value_dim=value_dim, element_bytes=query.element_size()
    )
    with torch.cuda.device_of(query):
        kernels.attend_splits[heads, num_splits](
            query.contiguous(),
            key,
            value,
            visible,
            partial,
            logsumexp,
            scaling,
            kv_heads,
            per_split,
            *key.stride()[:3],
            *value.stride()[:3],
            **compiled_for,
        )
        combine(partial, logsumexp, result, counter=visible, split_tokens=per_split)
    return result


def combine(
    partial: Tensor,
    logsumexp: Tensor,
    result: Tensor,
    *,
    counter: Tensor | None = None,
    split_tokens: int = 0,
) -> None:
    """Write into `result` [batch, 1, heads, width of V] the attention of splits [KV heads in all,
    splits, queries, width of V], given their logsumexp to the base 2; with a `counter` on the
    device, of as many splits of `split_tokens` as it fills.
    """
    from kvcalc.strategies import _plain_kernels as kernels

    heads, num_splits, queries, value_dim = partial.shape
    kernels.combine_splits[heads, queries, ceil_div(value_dim, COMBINED_CHANNELS)](
        partial,
        logsumexp,
        logsumexp if counter is None else counter,
        result,
        num_splits,
        split_tokens,
        COUNTED=counter is not None,
        QUERIES=queries,
        VALUE_DIM=value_dim,
        BLOCK_DIM=COMBINED_CHANNELS,
        BLOCK_SPLITS=COMBINED_SPLITS,
    )


def applies(device: torch.device) -> bool:
    """Whether attention is replaced there: on CPUs SDPA takes a mask as well as none."""
    return device.type == "cuda"


def one_backend(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA SDPA takes flash attention, efficient attention or plain mathematics, in this order.

    cuDNN, which torch 2.11 prefers on an H200, builds a plan for each new length: a decode step of
    a growing cache would be the time of that.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def attends_by_sdpa(model: "PreTrainedModel") -> bool:
    """Whether any part of a model does."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "_attn_implementation", None) == "sdpa" for config in configs)


@contextmanager
def in_place_of_sdpa(function: Any, mask: Any = sdpa_mask) -> Iterator[None]:  # noqa: ANN401
    """Models that attend by `sdpa` attend by this function, with what this mask function makes;
    what was there before is put back at the end, after an error, too.

    In its place, not beside it under a name of its own: some models ask whether the name is `sdpa`,
    and then make the mask of what an indexer has chosen (DeepSeek-V3.2), or none (Falcon).
    """
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = before


@contextmanager
def attending(model: "PreTrainedModel") -> Iterator[Counter[str]]:
    """Put `attention` in the place of `sdpa` for a model on CUDA.

    Yields the calls so far by what answered them: `fused`, `flash` or another kernel of `sdpa`. It
    stays empty where nothing is replaced.
    """
    calls.clear()
    if not applies(model.device):
        yield calls
        return
    with in_place_of_sdpa(attention, causal_mask):
        yield calls
