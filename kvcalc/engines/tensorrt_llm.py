"""TensorRT-LLM: blocks of tokens in a pool that is made at the start.

Read in `cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp` and `tensorrt_llm/_torch/pyexecutor/`
(`_util.py`, `resource_manager.py`) of TensorRT-LLM 1.2 to main (2026), its PyTorch backend; the
tests compare sizes that servers printed. What is counted is the first KV cache manager:

- A sequence holds ceil(tokens / `tokens_per_block`) blocks, and a block all layers. `max_tokens` is
  rounded up to blocks.
- Each layer has K and V of one head width for the whole model: a narrower V is padded to it.
- Latents are one row, without V, whole on every rank; index keys take 132 bytes whatever the dtype.
- Without `max_attention_window` there is one window, and so window layers keep every token.
- `auto` is what the checkpoint says of its KV cache (ModelOpt), else the model's dtype.

The second manager, which Gemma 3 and 4, gpt-oss, Llama 4, DeepSeek-V4 and models with states use,
divides memory between pools by rules that are not covered; for some of them
`use_kv_cache_manager_v2=false` chooses the first. Drafts, attention data parallelism and encoders
are not covered either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from kvcalc.config import FieldUse
from kvcalc.dtypes import StorageFormat
from kvcalc.engines import Option, Plan
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import HeadsLayer, LatentAttention, Layer, PlainLayer
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache, SlidingLatent
from kvcalc.units import ceil_div

OPTIONS: Mapping[str, Option] = {
    "tokens_per_block": Option("count", None, "tokens of a block; else 32, with index keys 64"),
    "max_tokens": Option("count", None, "tokens of the pool; else what the batch needs"),
    "use_kv_cache_manager_v2": Option("flag", None, "the second manager; else by model"),
}

FORMATS_TAKEN = ("fp32", "bf16", "fp16", "fp8", "nvfp4")

TOKENS_PER_BLOCK = 32
INDEXED_TOKENS_PER_BLOCK = 64

SECOND_MANAGER = frozenset(
    """
    diffusion_gemma_text gemma3_text gemma3n_text gemma4_text gemma4_unified_text gpt_oss
    llama4_text
    """.split()
)
"""Model types that use the second manager unless told otherwise."""

INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa"})

LATENTS = INDEXED | {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"}
"""Model types whose latents are known to be kept as such."""

Options = Mapping[str, Any]


def source() -> str:
    """The files, and what was checked."""
    return (
        "TensorRT-LLM kvCacheManager.cpp, resource_manager.py (1.2 to 2026 main): blocks × layers"
    )


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """Pipelines of unlike layers; other models are refused when laid out."""
    del tp
    if pp > 1 and len(set(architecture.layers)) > 1:
        msg = (
            "where TensorRT-LLM cuts a model of unlike layers into pipeline stages is not covered; "
            "leave --pp out or use --engine model"
        )
        raise UnsupportedError(msg)


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """The KV quantisation that the checkpoint declares, else the model's dtype."""
    return architecture.cache_dtype


def check_dtype(dtype: StorageFormat) -> None:
    """What `kv_cache_config.dtype` takes."""
    if dtype.name not in FORMATS_TAKEN:
        msg = f"TensorRT-LLM keeps a cache in {', '.join(FORMATS_TAKEN)}, not {dtype.name}"
        msg += "; llama.cpp keeps q8_0 to q4_0" * (dtype.block_elements == 32)
        raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The pool: as many blocks as `max_tokens` needs, or else each sequence its own."""

    tokens_per_block: int
    max_tokens: int | None

    def blocks(self, tokens: int, batch: int) -> int:
        """Blocks there are."""
        if self.max_tokens is not None:
            return self.of(self.max_tokens)
        return batch * self.of(tokens)

    def of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return ceil_div(tokens, self.tokens_per_block)

    def check(self, tokens: int, batch: int) -> None:
        """Raise InputError where a pool of the user's size does not hold what is asked for."""
        if self.blocks(tokens, batch) < batch * self.of(tokens):
            msg = (
                f"TensorRT-LLM: {self.blocks(tokens, batch):,} blocks of {self.tokens_per_block} "
                f"tokens do not hold {batch:,} × {tokens:,}; leave max_tokens out or make it larger"
            )
            raise InputError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksLayer(PlainLayer):
    """Rows of one layer for each token of each block; `width` is that of K and V of a head."""

    layer: HeadsLayer | LatentAttention | IndexKeys
    pool: Blocks
    width: int

    @property
    def kind(self) -> str:
        """`full_attention_blocks`, also for a window: nothing of it is dropped."""
        name = "full_attention" if isinstance(self.layer, HeadsLayer) else self.layer.kind
        return f"{name}_blocks"

    def token_bytes(self, dtype: StorageFormat) -> int:
        """Bytes of a token."""
        if isinstance(self.layer, IndexKeys):
            return self.layer.key_bytes(dtype)
        if isinstance(self.layer, LatentAttention):
            return dtype.row_bytes(self.layer.latent_dim + self.layer.rope_dim)
        return 2 * dtype.row_bytes(self.layer.kv_heads * self.width)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """All tokens of all blocks."""
        blocks = self.pool.blocks(tokens, batch)
        return blocks * self.pool.tokens_per_block * self.token_bytes(dtype)

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def shard(self, tp: int) -> Self:
        """Some of the heads; latents and index keys whole."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """What a token has, padding included."""
        if isinstance(self.layer, HeadsLayer):
            heads = self.layer.kv_heads
            return f"{heads} KV head{'s' * (heads > 1)} × ({self.width} K + {self.width} V)"
        return self.layer.keeps()

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Blocks × tokens × bytes, of one sequence alone."""
        blocks, held = self.pool.blocks(tokens, 1), self.pool.tokens_per_block
        size = self.token_bytes(dtype)
        return f"{blocks:,} blocks × {held} tokens × {size:,} B ({self.keeps()})"


def check_point(architecture: Architecture, plan: Plan) -> None:
    """A pool of given tokens holds so many."""
    parts = {part for layer in architecture.layers for part in layer.parts()}
    _pool(parts, plan.options).check(plan.tokens, plan.batch)


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """Blocks. Raises UnsupportedError for models of the second manager and layers that the first
    does not keep, InputError for options that cannot be.
    """
    options = plan.options if plan else {name: option.default for name, option in OPTIONS.items()}
    parts = {part for layer in architecture.layers for part in layer.parts()}
    _check_manager(architecture, options["use_kv_cache_manager_v2"])
    for part in parts:
        _check_kind(part, architecture.model_type)
    pool = _pool(parts, options)
    width = _width(parts)
    latent = any(isinstance(part, LatentAttention) for part in parts)
    if plan and latent and plan.dtype.name == "nvfp4":
        msg = "TensorRT-LLM's nvfp4 latents keep more beside them, which is not covered; use fp8"
        raise UnsupportedError(msg)

    def change(part: Layer) -> Layer:
        if isinstance(part, HeadsLayer | LatentAttention | IndexKeys):
            return BlocksLayer(layer=part, pool=pool, width=width)
        return part

    return tuple(layer.each(change) for layer in architecture.layers)


def _check_manager(architecture: Architecture, second: bool | None) -> None:
    """Refuse the second manager."""
    if second is None:
        second = architecture.model_type in SECOND_MANAGER
    if second:
        msg = (
            f"TensorRT-LLM keeps model_type {architecture.model_type!r} with its second KV cache "
            "manager, whose pools are not covered; use_kv_cache_manager_v2=false sizes it with the "
            "first, --engine vllm or sglang have pools of their own"
        )
        raise UnsupportedError(msg)


def _check_kind(part: Layer, model_type: str) -> None:
    """Refuse layers of which it is not known how the first manager keeps them."""
    if isinstance(part, CrossAttention | SlidingLatent):
        known = False
    elif isinstance(part, IndexKeys):
        known = model_type in INDEXED
    elif isinstance(part, LatentAttention):
        known = model_type in LATENTS
    else:  # blocks without attention (NAS) have no heads, layers that share may have them
        known = isinstance(part, HeadsLayer) or (
            isinstance(part, NoCache) and part.reason == "no attention in this block"
        )
    if not known:
        msg = (
            f"how TensorRT-LLM keeps layers of kind {part.kind} of model_type {model_type!r} is "
            "not covered; use --engine model"
        )
        raise UnsupportedError(msg)


def _width(parts: set[Layer]) -> int:
    """The one head width of a model; UnsupportedError when its layers or its V have others."""
    heads = [part for part in parts if isinstance(part, HeadsLayer)]
    widths = {part.key_dim for part in heads}
    if len(widths) > 1 or any(part.value_dim > part.key_dim for part in heads):
        msg = (
            "TensorRT-LLM's first KV cache manager keeps K and V of one head width in all layers, "
            "and this model has several; llama.cpp gives each layer its own"
        )
        raise UnsupportedError(msg)
    return widths.pop() if widths else 0


def _pool(parts: set[Layer], options: Options) -> Blocks:
    """The pool that options and layers make."""
    indexed = any(isinstance(part, IndexKeys) for part in parts)
    size = options["tokens_per_block"]
    if size is None:
        size = INDEXED_TOKENS_PER_BLOCK if indexed else TOKENS_PER_BLOCK
    if size < 2 or size & (size - 1):
        msg = f"tensorrt-llm option tokens_per_block must be a power of two above 1, not {size}"
        raise InputError(msg)
    if indexed and size != INDEXED_TOKENS_PER_BLOCK:
        msg = f"TensorRT-LLM's index keys are in blocks of {INDEXED_TOKENS_PER_BLOCK}, not {size}"
        raise UnsupportedError(msg)
    return Blocks(tokens_per_block=size, max_tokens=options["max_tokens"])


def token_bytes(
    architecture: Architecture, *, dtype: StorageFormat, tp: int, options: Options
) -> int:
    """Bytes of a token in all layers, on one of `tp` ranks; `options` are all of `read_options`."""
    layers = lay_out(architecture, Plan(1, 1, dtype, tp, 1, {**options, "max_tokens": None}))
    parts = [part for layer in layers for part in layer.shard(tp).parts()]
    return sum(part.token_bytes(dtype) for part in parts if isinstance(part, BlocksLayer))


class Capacity(NamedTuple):
    """What one rank has: blocks, and the tokens that they hold."""

    blocks: int
    tokens: int


def capacity(
    architecture: Architecture,
    budget_bytes: int,
    *,
    dtype: StorageFormat,
    tp: int,
    options: Options,
) -> Capacity:
    """The pool that TensorRT-LLM makes in `budget_bytes` of one rank: the tokens that fit, or
    `max_tokens` if those are fewer, rounded up to blocks. It may be one block beyond the budget.
    """
    size = token_bytes(architecture, dtype=dtype, tp=tp, options=options)
    tokens = max(budget_bytes, 0) // size if size else 0
    limit = options["max_tokens"]
    if limit is not None:
        tokens = min(tokens, limit)
    pool = _pool({part for layer in architecture.layers for part in layer.parts()}, options)
    blocks = pool.of(tokens)
    return Capacity(blocks, blocks * pool.tokens_per_block)


def room(architecture: Architecture, plan: Plan, available_bytes: int) -> dict[str, int]:
    """The pool that a rank makes of so many bytes: blocks, and the tokens it prints."""
    found = capacity(
        architecture, available_bytes, dtype=plan.dtype, tp=plan.tp, options=plan.options
    )
    return {"primary_blocks": found.blocks, "max_tokens": found.tokens}


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None: everything is there from the start."""
    del layers, tokens, batch, dtype
    return {}
