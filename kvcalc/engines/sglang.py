"""SGLang: pools of slots, one a token, shared by all sequences and made at the start.

Read in `mem_cache/memory_pool.py`, `kv_cache_configurator.py`, `swa_memory_pool.py`,
`model_executor/pool_configurator.py`, `configs/` and `arg_groups/` of the SGLang 0.5.23 wheel. Its
pool classes were run on a CPU and allocated the same; the tests compare what servers printed.

- A pool for n tokens (n a multiple of `page_size`) has n + `page_size` slots: the further page
  takes the writes of padding. A rank keeps max(1, heads ÷ tp) KV heads, and latents whole.
- The slots of a pool are alike, and every layer has them: also one that shares another's KV or has
  no attention, but for models with states, whose other layers have none.
- Windows shorten nothing, but in HYBRID_SWA: their window layers have a pool of their own, of
  `swa_full_tokens_ratio` times the tokens of the full one (or, without radix cache and with
  `max_running_requests`, of what that many requests can hold), and no server starts where it holds
  no more than window + page.
- DeepSeek sparse attention has pages of 64 and, in fp8, 656 bytes for a latent (512 values, 4
  scales, a 64-wide rotary key in bf16), 576 under the TensorRT-LLM kernels; its index keys take 132
  bytes whatever the dtype.
- States have slots: `max_mamba_cache_size` and one more. With radix cache a request may need 3, and
  in EXTRA_BUFFER two more for tracking; else 1. Convolutions are kept in bf16, recurrent states in
  f32 unless `mamba_ssm_dtype` says otherwise.

Where `max_total_tokens` is not given the pools are those that this many sequences need at once:
each its tokens, rounded up to pages, and in the window pool what a prefill is charged, one window
and one page. Speculative drafts and attention data or context parallelism are not covered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

from kvcalc.config import FieldUse
from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.engines import Option, Plan, Same
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import HeadsLayer, LatentAttention, Layer, PlainLayer, Windowed
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache, SlidingLatent
from kvcalc.layers.states import State, StateLayer
from kvcalc.units import GIB, ceil_div

OPTIONS: Mapping[str, Option] = {
    "page_size": Option("count", None, "slots of a page; else 1, with sparse attention 64"),
    "max_total_tokens": Option("count", None, "tokens of the (full) pool; else seq × batch"),
    "max_running_requests": Option("count", None, "requests at once; else the batch"),
    "swa_full_tokens_ratio": Option("share", 0.8, "tokens of the window pool to those of the full"),
    "chunked_prefill_size": Option("count", None, "tokens of a chunk; sizes capped window pools"),
    "max_mamba_cache_size": Option("count", None, "slots for states; else those of the requests"),
    "mamba_full_memory_ratio": Option(
        "share", 0.9, "memory for states to that for KV, in a budget"
    ),
    "mamba_ssm_dtype": Option("format", "fp32", "format of recurrent states"),
    "enable_mamba_extra_buffer": Option("flag", None, "two more slots a request; else by model"),
    "disable_radix_cache": Option("flag", False, "no prefixes are kept (--disable-radix-cache)"),
    "dsa_trtllm": Option("flag", False, "sparse attention by trtllm kernels: fp8 without scales"),
}

FORMATS_TAKEN = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
"""nvfp4 is `nvfp4` on trtllm_mha or `fp4_mx_block16`: both keep a scale for 16 values."""

SPARSE_PAGE = 64
SPARSE_BYTES = 512 + 512 // 128 * 4 + 64 * 2

EVICTION_INTERVAL = 128
"""Tokens after which a window's oldest are given up (SGLANG_SWA_EVICTION_INTERVAL)."""

HYBRID_SWA = frozenset(
    """
    diffusion_gemma_text gemma4_text gemma4_unified_text gpt_oss granite_swa granitemoe_swa laguna
    llama4_text mellum mimo_v2_flash muse_glimmer_text step3p5 step3p7
    """.split()
)
"""Model types that have a window pool (`is_hybrid_swa_model`). Gemma 2 and 3, Exaone 4, OLMo 3 and
all others have none, so that their window layers keep every token.
"""

OWN_WINDOW_SHAPE = frozenset(
    "diffusion_gemma_text gemma4_text gemma4_unified_text mimo_v2_flash".split()
)
"""Those whose window pool has heads and widths of its own (`is_hybrid_swa_compress`)."""

WINDOW_BEFORE = OWN_WINDOW_SHAPE | {"gpt_oss", "mellum", "muse_glimmer_text"}
"""Those in which SGLang's window counts the tokens before the new one, and so is one less."""

LATENTS = frozenset(
    """
    deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_linear longcat_flash
    minicpm3
    """.split()
)
"""Model types whose latents SGLang keeps as such."""

SPARSE = frozenset({"deepseek_v32", "glm_moe_dsa"})

EXTRA_BUFFER = frozenset(
    """
    falcon_h1 granitemoehybrid kimi_linear nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next
    """.split()
)
"""Model types whose radix cache keeps two buffers for a request's states."""

STATES = EXTRA_BUFFER | {"falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2"}
"""Model types whose states SGLang keeps as they are counted here."""

Options = Mapping[str, Any]


def source() -> str:
    """The files, and what was checked."""
    return "SGLang 0.5.23 mem_cache/memory_pool.py, pool_configurator.py: (tokens + page) slots"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """Pipelines of unlike layers, which SGLang cuts elsewhere; others are refused when laid out."""
    del tp
    if pp > 1 and len(set(architecture.layers)) > 1:
        msg = (
            "where SGLang cuts a model of unlike layers into pipeline stages is not covered; leave "
            "--pp out or use --engine model"
        )
        raise UnsupportedError(msg)


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """The model's dtype, or fp8 where ModelOpt's `kv_cache_quant_algo` says so.

    SGLang follows a `kv_cache_scheme` in ModelOpt's checkpoints only, not in compressed-tensors':
    which of them wrote it is not known here, and so the user must say.
    """
    if _is_sparse(architecture):
        return FieldUse("kv_cache_dtype", "bf16", "SGLang's default on Hopper; fp8 on Blackwell")
    use = architecture.cache_dtype
    if isinstance(use, FieldUse) and use.key.endswith("kv_cache_scheme"):
        return ConfigError(
            f"config field {use.key} ({use.value}) decides SGLang's cache if ModelOpt wrote it "
            "(quant_method modelopt), else the model's dtype does: give --kv-dtype"
        )
    if isinstance(use, FieldUse) and use.key.endswith("kv_cache_quant_algo"):
        return use if use.value == "fp8" else architecture.model_dtype
    return use


def check_dtype(dtype: StorageFormat) -> None:
    """What `--kv-cache-dtype` takes."""
    if dtype.name not in FORMATS_TAKEN:
        msg = f"SGLang keeps a cache in {', '.join(FORMATS_TAKEN)}, not {dtype.name}"
        msg += "; llama.cpp keeps q8_0 to q4_0" * (dtype.block_elements == 32)
        raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The full pool and, where `window` is set, the window pool. `requests` and `chunk` are set
    where the window pool is sized by them; `has_full` says that there are full layers at all.
    """

    page: int
    max_total_tokens: int | None
    ratio: float
    window: int | None
    has_full: bool = True
    requests: int | None = None
    chunk: int = 0

    def full_tokens(self, tokens: int, batch: int) -> int:
        """Tokens of the full pool."""
        if self.max_total_tokens is not None:
            return self._down(self.max_total_tokens)
        needed = batch * self._up(tokens)
        if self.window is None or not self.has_full:
            return needed
        if self.requests is not None:
            return max(needed, batch * self._charge(tokens))
        return max(needed, self._least_full(self._window_needed(tokens, batch)))

    def window_tokens(self, tokens: int, batch: int) -> int:
        """Tokens of the window pool."""
        full = self.full_tokens(tokens, batch)
        if not self.has_full:
            return full if self.max_total_tokens is not None else self._window_needed(tokens, batch)
        if self.requests is not None:
            return min(self._cap(), full)
        return self.share(full)

    def share(self, full_tokens: int) -> int:
        """Tokens of a window pool beside a full pool."""
        return self._down(int(full_tokens * self.ratio))

    def slots(self, tokens: int, batch: int, *, windowed: bool) -> int:
        """Slots of either pool: a page more than its tokens."""
        size = self.window_tokens if windowed else self.full_tokens
        return size(tokens, batch) + self.page

    def starts(self, window_tokens: int) -> bool:
        """Whether the window pool is large enough for a server to start."""
        by_ratio = self.window is not None and self.has_full and self.requests is None
        return not by_ratio or window_tokens > (self.window or 0) + self.page

    def check(self, tokens: int, batch: int) -> None:
        """Raise InputError where pools of the user's sizes do not hold what is asked for."""
        full = self.full_tokens(tokens, batch)
        needed = batch * self._up(tokens)
        if self.has_full and full < needed:
            msg = (
                f"SGLang: a pool of {full:,} tokens does not hold {batch:,} × {tokens:,}; leave "
                "max_total_tokens out or make it larger"
            )
            raise InputError(msg)
        if self.window is None:
            return
        held = self.window_tokens(tokens, batch)
        if held < batch * self._charge(tokens) or not self.starts(held):
            msg = (
                f"SGLang: a window pool of {held:,} tokens is too small for {batch:,} × a window "
                f"of {self.window:,} and a page; make max_total_tokens, swa_full_tokens_ratio or "
                "max_running_requests larger"
            )
            raise InputError(msg)

    def _charge(self, tokens: int) -> int:
        """What a prefill reserves in the window pool."""
        return self._up(min(tokens, self.window or 0) + self.page)

    def _window_needed(self, tokens: int, batch: int) -> int:
        needed = batch * self._charge(tokens)
        return max(needed, self._up((self.window or 0) + self.page + 1) if self.has_full else 0)

    def _least_full(self, window_tokens: int) -> int:
        """Tokens of the smallest full pool beside which a window pool has so many."""
        full = max(self._down(int(window_tokens / self.ratio)) - 2 * self.page, self.page)
        while self.share(full) < window_tokens:
            full += self.page
        return full

    def _cap(self) -> int:
        """What `requests` can hold at most (`compute_swa_request_cap`, two chunks in flight)."""
        each = (self.window or 0) + EVICTION_INTERVAL + 2 * self.page
        return self._up((self.requests or 0) * each + 2 * self.chunk + self.page)

    def _up(self, tokens: int) -> int:
        return ceil_div(tokens, self.page) * self.page

    def _down(self, tokens: int) -> int:
        return tokens // self.page * self.page


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsLayer(PlainLayer):
    """Rows of one layer for each slot of a pool; `scaled` latents are those of 656 bytes."""

    layer: HeadsLayer | LatentAttention | IndexKeys
    pools: Pools
    windowed: bool = False
    scaled: bool = False

    @property
    def kind(self) -> str:
        """`full_attention_slots`, `window_slots` or what else the slots are of."""
        if isinstance(self.layer, HeadsLayer):
            return "window_slots" if self.windowed else "full_attention_slots"
        return f"{self.layer.kind}_slots"

    def slot_bytes(self, dtype: StorageFormat) -> int:
        """Bytes of a slot."""
        if isinstance(self.layer, IndexKeys):
            return self.layer.key_bytes(dtype)
        if isinstance(self.layer, LatentAttention):
            if self.scaled:
                return SPARSE_BYTES
            return dtype.row_bytes(self.layer.latent_dim + self.layer.rope_dim)
        return self.layer.row_bytes(dtype)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """All slots, used or not."""
        slots = self.pools.slots(tokens, batch, windowed=self.windowed)
        return slots * self.slot_bytes(dtype)

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def shard(self, tp: int) -> Self:
        """Some of the heads; latents and index keys whole."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """What a slot holds."""
        return f"{self.layer.keeps()} for a slot"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Slots × bytes, of one sequence alone."""
        slots = self.pools.slots(tokens, 1, windowed=self.windowed)
        return f"{slots:,} slots × {self.slot_bytes(dtype):,} B ({self.layer.keeps()})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlots(PlainLayer):
    """States of one layer for each slot there is, and one more for padding; without `slots` as many
    as `requests`, or the batch, need at `per_request`.
    """

    kind: ClassVar[str] = "state_slots"
    layer: StateLayer
    slots: int | None
    requests: int | None
    per_request: int
    ssm: StorageFormat

    def slot_bytes(self) -> int:
        """Bytes of a slot: recurrent states in their format, all else in bf16."""
        return sum(self._format(state).row_bytes(prod(state.shape)) for state in self.layer.states)

    def _format(self, state: State) -> StorageFormat:
        return self.ssm if state.dtype else FORMATS["bf16"]

    def _slots(self, batch: int) -> int:
        return (self.slots or (self.requests or batch) * self.per_request) + 1

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """All slots."""
        del tokens, dtype
        return self._slots(batch) * self.slot_bytes()

    def shard(self, tp: int) -> Self:
        """Some of the heads and channels."""
        return replace(self, layer=self.layer.shard(tp))

    def keeps(self) -> str:
        """The states of a slot."""
        return self.layer.keeps().replace("per sequence", "per slot")

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Slots × bytes, of one sequence alone."""
        del tokens, dtype
        return f"{self._slots(1):,} slots × {self.slot_bytes():,} B ({self.keeps()})"


def check_point(architecture: Architecture, plan: Plan) -> None:
    """Pools of a given size, and slots of states, hold so many requests."""
    pools, per_request = _limits(Same(architecture), Same(plan.options))
    pools.check(plan.tokens, plan.batch)
    _check_requests(plan.options, plan.batch, per_request=per_request)


@lru_cache(maxsize=8)
def _limits(architecture: Same[Architecture], options: Same[Options]) -> tuple[Pools, int]:
    """The pools, and slots that a request may need, 0 without states; a search asks many times."""
    parts = [part for layer in _filled(architecture.it) for part in layer.parts()]
    pools = _pools(architecture.it, parts, options.it)
    states = any(isinstance(part, StateLayer) for part in parts)
    return pools, _per_request(architecture.it, options.it) if states else 0


def counts_scales(architecture: Architecture, plan: Plan) -> bool:
    """Whether latents have scales: in fp8 those of sparse attention, but for one kernel's."""
    return _is_sparse(architecture) and plan.dtype.name == "fp8" and not plan.options["dsa_trtllm"]


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """Slots for rows and states.

    Raises UnsupportedError for layers whose pools are not known, and for formats that they do not
    take; InputError for options that cannot be.
    """
    options = plan.options if plan else {name: option.default for name, option in OPTIONS.items()}
    _check_kinds(architecture)
    layers = _filled(architecture)
    parts = [part for layer in layers for part in layer.parts()]
    hybrid = architecture.model_type in HYBRID_SWA
    pools = _pools(architecture, parts, options)
    if plan:
        _check_format(parts, plan.dtype, sparse=_is_sparse(architecture), hybrid=hybrid)
    scaled = plan is not None and counts_scales(architecture, plan)
    ssm = FORMATS[options["mamba_ssm_dtype"]]
    if ssm.name not in ("fp32", "bf16", "fp16"):
        msg = f"SGLang keeps recurrent states in fp32, bf16 or fp16, not {ssm.name}"
        raise InputError(msg)

    def change(part: Layer) -> Layer:
        if isinstance(part, StateLayer):
            return StateSlots(
                layer=part,
                slots=options["max_mamba_cache_size"],
                requests=options["max_running_requests"],
                per_request=_per_request(architecture, options),
                ssm=ssm,
            )
        if isinstance(part, HeadsLayer | LatentAttention | IndexKeys):
            return SlotsLayer(
                layer=part,
                pools=pools,
                windowed=hybrid and isinstance(part, Windowed),
                scaled=scaled and isinstance(part, LatentAttention),
            )
        return part

    return tuple(layer.each(change) for layer in layers)


def _is_sparse(architecture: Architecture) -> bool:
    return architecture.model_type in SPARSE


def _check_kinds(architecture: Architecture) -> None:
    """Refuse layers that SGLang keeps in no way that is known here."""
    model_type = architecture.model_type
    parts = {part for layer in architecture.layers for part in layer.parts()}
    for part in parts:
        if isinstance(part, CrossAttention | SlidingLatent):
            known = False
        elif isinstance(part, LatentAttention):
            known = model_type in LATENTS
        elif isinstance(part, IndexKeys):
            known = model_type in SPARSE
        elif isinstance(part, StateLayer):
            dtypes = {state.dtype for state in part.states}
            known = model_type in STATES and dtypes <= {"", "fp32"}
        else:
            known = isinstance(part, HeadsLayer | NoCache)
        if not known:
            msg = (
                f"how SGLang keeps layers of kind {part.kind} of model_type {model_type!r} is not "
                "covered; use --engine model"
            )
            raise UnsupportedError(msg)


def _filled(architecture: Architecture) -> tuple[Layer, ...]:
    """The layers, with rows in those that use none: every layer of a pool has its slots.

    Raises UnsupportedError where the layers of a pool are not alike, and where there is no pool.
    """
    model_type, layers = architecture.model_type, architecture.layers
    parts = [part for layer in layers for part in layer.parts()]
    hybrid = model_type in HYBRID_SWA
    rows = {
        (hybrid and isinstance(part, Windowed), _shape(part))
        for part in parts
        if isinstance(part, HeadsLayer | LatentAttention)
    }
    if len({shape for windowed, shape in rows if windowed}) > 1 or (
        len({shape for windowed, shape in rows if not windowed}) > 1
        or (len({shape for _, shape in rows}) > 1 and model_type not in OWN_WINDOW_SHAPE)
    ):
        msg = (
            "SGLang's pools have slots of one shape, and the layers of this model are not alike; "
            "llama.cpp gives each layer its own"
        )
        raise UnsupportedError(msg)
    empty = [index for index, layer in enumerate(layers) if isinstance(layer, NoCache)]
    if not empty or model_type in STATES:
        if not rows and model_type not in STATES:
            msg = f"model_type {model_type!r} keeps no K and V; nothing of SGLang's is known for it"
            raise UnsupportedError(msg)
        return layers
    windowed = _window_kinds(architecture) if hybrid else [False] * len(layers)
    models = {
        hybrid and isinstance(layer, Windowed): layer
        for layer in layers
        if isinstance(layer, HeadsLayer | LatentAttention)
    }
    if not {windowed[index] for index in empty} <= set(models):
        msg = f"no layer of model_type {model_type!r} says what SGLang makes room for in others"
        raise UnsupportedError(msg)
    filled = list(layers)
    for index in empty:
        filled[index] = models[windowed[index]]
    return tuple(filled)


def _shape(part: HeadsLayer | LatentAttention) -> object:
    if isinstance(part, LatentAttention):
        return part.latent_dim, part.rope_dim
    return part.rows()


def _window_kinds(architecture: Architecture) -> Sequence[bool]:
    """Which layers slide, as `layer_types` says: those that share another's KV are slots, too."""
    for use in architecture.fields:
        listed = use.value if use.key.rpartition(".")[2] == "layer_types" else None
        if isinstance(listed, list | tuple) and len(listed) == len(architecture.layers):
            kinds = [kind == "sliding_attention" for kind in listed]
            return [*kinds[:-1], False] if "gemma" in architecture.model_type else kinds
    msg = (
        "SGLang makes room for layers that share another's KV, too, and the config does not list "
        "their kinds; deciding field: layer_types"
    )
    raise UnsupportedError(msg)


def _pools(architecture: Architecture, parts: Sequence[Layer], options: Options) -> Pools:
    """The pools that options and layers make."""
    sparse = _is_sparse(architecture)
    page = options["page_size"]
    if page is None:
        page = SPARSE_PAGE if sparse else 1
    if page < 1:
        msg = "sglang option page_size must be at least 1"
        raise InputError(msg)
    if sparse and page != SPARSE_PAGE:
        msg = f"SGLang's sparse attention has pages of {SPARSE_PAGE}, not {page}"
        raise InputError(msg)
    windows = {part.window for part in parts if isinstance(part, Windowed)}
    window = None
    if architecture.model_type in HYBRID_SWA and windows:
        window = max(windows) - (architecture.model_type in WINDOW_BEFORE)
    has_full = any(
        isinstance(part, HeadsLayer | LatentAttention) and not isinstance(part, Windowed)
        for part in parts
    )
    capped = window is not None and has_full and options["disable_radix_cache"]
    requests = options["max_running_requests"] if capped else None
    chunk = options["chunked_prefill_size"]
    if requests and chunk is None:
        msg = (
            "SGLang sizes the window pool by max_running_requests and chunked_prefill_size when "
            "there is no radix cache: give chunked_prefill_size, which else depends on the GPU"
        )
        raise InputError(msg)
    if window is not None and not options["swa_full_tokens_ratio"]:
        msg = "sglang option swa_full_tokens_ratio must be more than 0"
        raise InputError(msg)
    return Pools(
        page=page,
        max_total_tokens=options["max_total_tokens"],
        ratio=options["swa_full_tokens_ratio"],
        window=window,
        has_full=window is None or has_full,
        requests=requests if chunk else None,
        chunk=chunk or 0,
    )


def _check_format(
    parts: Sequence[Layer], dtype: StorageFormat, *, sparse: bool, hybrid: bool
) -> None:
    """Refuse formats that some pools do not take."""
    if sparse and dtype.name not in ("bf16", "fp8"):
        msg = f"SGLang's sparse attention keeps latents in bf16 or fp8, not {dtype.name}"
        raise UnsupportedError(msg)
    if dtype.name != "nvfp4":
        return
    wider = any(part.key_dim != part.value_dim for part in parts if isinstance(part, HeadsLayer))
    if hybrid or wider:
        why = "with a window pool" if hybrid else "whose K and V differ in width"
        msg = f"how SGLang keeps {dtype.name} in a model {why} is not covered; use fp8 or bf16"
        raise UnsupportedError(msg)


def _per_request(architecture: Architecture, options: Options) -> int:
    """Slots for states that a running request may need."""
    if options["disable_radix_cache"]:
        return 1
    extra = options["enable_mamba_extra_buffer"]
    if extra is None:
        extra = architecture.model_type in EXTRA_BUFFER
    return 3 + 2 * bool(extra)


def _check_requests(options: Options, batch: int, *, per_request: int) -> None:
    """Raise InputError where fewer requests run at once than the batch has sequences."""
    running = options["max_running_requests"]
    if running is not None and running < batch:
        msg = f"SGLang runs {running:,} requests at once, not {batch:,} (max_running_requests)"
        raise InputError(msg)
    slots = options["max_mamba_cache_size"]
    if per_request and slots is not None and slots // per_request < batch:
        msg = (
            f"SGLang runs {slots // per_request:,} requests at once, not {batch:,}; a request may "
            f"need {per_request} of max_mamba_cache_size"
        )
        raise InputError(msg)


class SlotBytes(NamedTuple):
    """Bytes on one rank: of a token in the full pool and in the window pool, all their layers
    together, and of a slot for states.
    """

    full: int
    window: int
    state: int


class Capacity(NamedTuple):
    """What fits one rank: tokens of the full pool (`max_total_num_tokens`) and of the window pool,
    0 where no server would start, and `max_mamba_cache_size`.
    """

    full_tokens: int
    window_tokens: int
    state_slots: int


def slot_bytes(
    architecture: Architecture, *, dtype: StorageFormat, tp: int, options: Options
) -> SlotBytes:
    """Bytes of slots on one of `tp` ranks; `options` are all of `read_options`."""
    anything = {**options, "max_total_tokens": None, "max_mamba_cache_size": None}
    layers = lay_out(architecture, Plan(1, 1, dtype, tp, 1, anything))
    full = window = state = 0
    for layer in layers:
        for part in layer.shard(tp).parts():
            if isinstance(part, StateSlots):
                state += part.slot_bytes()
            elif isinstance(part, SlotsLayer) and part.windowed:
                window += part.slot_bytes(dtype)
            elif isinstance(part, SlotsLayer):
                full += part.slot_bytes(dtype)
    return SlotBytes(full, window, state)


def capacity(
    architecture: Architecture,
    budget_bytes: int,
    *,
    dtype: StorageFormat,
    tp: int,
    options: Options,
) -> Capacity:
    """The pools that SGLang makes in `budget_bytes` of one rank, rounded down to pages.

    The budget is what is left for states and KV. The further page of each pool comes on top of it,
    as in SGLang.
    """
    size = _slot_bytes(Same(architecture), dtype, tp, Same(options))
    slots = 0
    left = budget_bytes
    if size.state:
        slots, left = _state_share(budget_bytes, size.state, options)
    parts = [part for layer in _filled(architecture) for part in layer.parts()]
    pools = _pools(architecture, parts, options)
    limit = options["max_total_tokens"]

    def rounded(tokens: int) -> int:
        capped = tokens if limit is None else min(tokens, limit)
        return max(capped, 0) // pools.page * pools.page

    if pools.window is None:
        return Capacity(rounded(left // size.full) if size.full else 0, 0, slots)
    if not pools.has_full:
        return Capacity(0, rounded(left // size.window), slots)
    if pools.requests is not None:
        cap = replace(pools, max_total_tokens=2**60).window_tokens(1, 1)
        full = rounded((left - cap * size.window) // size.full)
        return Capacity(full, min(cap, full), slots)
    full = rounded(int(left // (size.full + pools.ratio * size.window)))
    window = pools.share(full)
    return Capacity(full, window, slots) if pools.starts(window) else Capacity(0, 0, slots)


def _state_share(budget_bytes: int, slot: int, options: Options) -> tuple[int, int]:
    """Slots for states, and the bytes that are left for KV (`_handle_max_mamba_cache`)."""
    slots = options["max_mamba_cache_size"]
    if slots is None and options["disable_radix_cache"]:
        slots = options["max_running_requests"]
    rest = budget_bytes / GIB
    if slots is None:
        ratio = options["mamba_full_memory_ratio"]
        slots = max(int((rest * ratio / (1 + ratio) * GIB - slot) // slot), 0)
    return slots, max(int((rest - (slots + 1) * slot / GIB) * GIB), 0)


def room(architecture: Architecture, plan: Plan, available_bytes: int) -> dict[str, int]:
    """The pools that a rank makes of so many bytes, by SGLang's names."""
    found = capacity(
        architecture, available_bytes, dtype=plan.dtype, tp=plan.tp, options=plan.options
    )
    return {
        "max_total_num_tokens": found.full_tokens or found.window_tokens,
        "swa_tokens": found.window_tokens,
        "max_mamba_cache_size": found.state_slots,
    }


def holds(architecture: Architecture, plan: Plan, needed_bytes: int, available_bytes: int) -> bool:
    """Whether the requests find tokens and states in the pools, between which the memory of a model
    with states is divided before they come.
    """
    del needed_bytes
    size = _slot_bytes(Same(architecture), plan.dtype, plan.tp, Same(plan.options))
    if not size.state:
        return True
    found = capacity(
        architecture, available_bytes, dtype=plan.dtype, tp=plan.tp, options=plan.options
    )
    _, per_request = _limits(Same(architecture), Same(plan.options))
    tokens = found.full_tokens or found.window_tokens
    return (not size.full or tokens >= plan.batch * plan.tokens) and (
        found.state_slots >= plan.batch * per_request
    )


@lru_cache(maxsize=8)
def _slot_bytes(
    architecture: Same[Architecture], dtype: StorageFormat, tp: int, options: Same[Options]
) -> SlotBytes:
    return slot_bytes(architecture.it, dtype=dtype, tp=tp, options=options.it)


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None: everything is there from the start."""
    del layers, tokens, batch, dtype
    return {}
