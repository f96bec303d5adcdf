"""vLLM: blocks from one pool that all layers share, as its V1 engine plans them.

Read in vLLM 0.33.0: `v1/kv_cache_interface.py` (bytes of a page), `v1/core/kv_cache_planning.py`
(groups), `v1/core/kv_cache_utils.py` (capacity), `platforms/interface.py` (block size of hybrids),
`model_executor/layers/mamba/` (states). Its own planner, alignment of blocks and shapes of states
were run without a GPU on the catalogue's models and agreed.

- A page is one block of one layer: K and V of `block_size` tokens, or all states of a sequence.
- Layers that need the same slots are one group. Else pages are made equal (smaller ones hold more
  tokens, or are padded), and layers form groups of equal size; a short group is padded. A block is
  one page for each layer of a group; a sequence takes blocks for each group.
- A window layer reserves window - 1 + in-flight tokens, and one block more, since a window seldom
  starts at the edge of a block. In flight are `max_num_batched_tokens` for each concurrent batch.
- With states, attention blocks are so long that a page holds all states of a layer. Prefix caching
  (`mamba_cache_mode` align, its default) keeps two copies of the states and the checkpoints.
- A latent is kept whole on every tensor-parallel rank, and so is an index key.

Sequences are counted with what vLLM reserves for a request of their length: "To serve at least one
request" names this at `max_model_len`. Block sizes that only some attention kernels want (32 or
64 for latents on Blackwell, 128 for heads of 256 on FlashAttention 4) must be given. Layouts with
the block outermost (KV connectors) and decode context parallelism are not covered.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import lcm
from typing import Any, ClassVar, NamedTuple, Self

from kvcalc.config import FieldUse
from kvcalc.dtypes import COMPUTE_DTYPES, StorageFormat, storage_format
from kvcalc.engines import Option, Plan, Same
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import (
    ChunkedAttention,
    FullAttention,
    HeadsLayer,
    LatentAttention,
    Layer,
    PlainLayer,
    SlidingAttention,
    per_rank,
)
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache
from kvcalc.layers.states import State, StateLayer
from kvcalc.units import ceil_div

OPTIONS: Mapping[str, Option] = {
    "block_size": Option("count", None, "tokens of a block; else 16, or 64 with an indexer"),
    "max_model_len": Option("count", None, "longest request; else the tokens"),
    "max_num_batched_tokens": Option(
        "count", 8192, "tokens of a step; vllm serve: 2048 under 70 GiB, 16384 from 160 GiB"
    ),
    "max_num_seqs": Option(
        "count", None, "requests at once; vllm serve: 256 under 70 GiB and on an A100, else 1024"
    ),
    "enforce_eager": Option("flag", False, "no CUDA graphs in a budget"),
    "estimate_cudagraphs": Option("flag", True, "graphs in a budget; vLLM before 0.21: false"),
    "sampler_sort": Option("flag", False, "sampling sorts all words; vLLM before 0.17: true"),
    "async_scheduling": Option("flag", True, "one batch more in flight"),
    "enable_prefix_caching": Option("flag", None, "else on, but off for models without attention"),
    "mamba_ssm_cache_dtype": Option("format", None, "recurrent states; else as the model says"),
    "num_speculative_tokens": Option("count", 0, "tokens drafted in a step"),
    "mtp": Option("flag", False, "drafts come from the model's prediction layers"),
    "num_prefill_checkpoint_blocks": Option(
        "count", None, "in align mode; else 1 for Mamba-2 and DeltaNet (0 where prefill is Triton)"
    ),
    "fp8_ds_mla": Option("flag", True, "656 B a token for fp8 latents with an indexer (FlashMLA)"),
    "per_token_head": Option("flag", False, "fp8 with a scale for each token and head"),
}

BLOCK_TOKENS = 16
INDEXER_BLOCK_TOKENS = 64
LATENT_HYBRID_TOKENS = 128
"""What a block is a multiple of: in general, with an indexer, and for latents beside states."""

DELTANET_CHECKPOINT_TOKENS = 64
"""What FlashInfer's DeltaNet prefill makes blocks a multiple of in align mode."""

DS_MLA_BYTES = {"fp8": 656, "nvfp4": 352}
"""Bytes a token of latent 512 + rotary key 64: fp8 + 4 float32 scales + a bf16 rotary key."""

SCALE_BYTES = 4
"""A float32 scale for each token, head and side."""

FORMATS_TAKEN = ("fp32", "fp16", "bf16", "fp8", "nvfp4", "int8", "int4")

UNKNOWN = frozenset(
    """
    deepseek_v4 deepseek_v41 deepseek_ref minimax_m3 minimax_m3_vl minimax_m3_vl_text qwen4_exp
    qwen4_exp_text hy_v4 kimi_k3 glm5_next glm5_next_text step5 dots3_note dots3_note_text inkling
    lfm3
    """.split()
)
"""Model types whose caches have rules of their own that are not covered here."""

LATENT_TYPES = frozenset(
    """
    axk1 deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa glm4_moe_lite kimi_k2 kimi_linear
    longcat_flash pangu_ultra_moe
    """.split()
)
"""Model types whose latents vLLM keeps as such; in others it keeps K and V of every head."""

ALL_OR_NO_WINDOWS = frozenset(
    """
    mimo qwen2 qwen2_5_omni_text qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3_moe
    qwen3_omni_moe_text
    """.split()
)
"""Model types that vLLM's own classes run with windows in all layers or in none (`qwen2.py`)."""


class _StateRule(NamedTuple):
    """How states of a model type are kept: format of recurrent states ("" for the compute dtype),
    checkpoints in align mode (None: it depends on the kernel), what they align blocks to, and
    whether convolutions keep a further column for each drafted token.
    """

    recurrent: str = ""
    checkpoints: int | None = 0
    alignment: int = 1
    drafts: bool = True


_MAMBA2 = _StateRule(checkpoints=1)
_DELTANET = _StateRule(checkpoints=1, alignment=DELTANET_CHECKPOINT_TOKENS)

STATE_RULES: Mapping[str, _StateRule] = {
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
    "mamba2": _MAMBA2,
    "zamba2": _MAMBA2,
    "nemotron_h": _MAMBA2._replace(recurrent="fp32"),
    "falcon_mamba": _StateRule(drafts=False),
    "jamba": _StateRule(drafts=False),
    "mamba": _StateRule(drafts=False),
    "lfm2": _StateRule(),
    "lfm2_moe": _StateRule(),
    "olmo_hybrid": _StateRule(),
    "qwen3_next": _DELTANET,
    "qwen3_5_text": _DELTANET._replace(recurrent="fp32"),
    "qwen3_5_moe_text": _DELTANET._replace(recurrent="fp32"),
    "kimi_linear": _StateRule(recurrent="fp32", checkpoints=None),
}
"""Model types with states that vLLM 0.33.0 runs. Published Qwen3.5 and Nemotron 3 configs say
float32, as does vLLM where a Nemotron-H says nothing; the others keep states as they compute.
"""


def source() -> str:
    """The files and the version."""
    return "vLLM 0.33.0 v1/kv_cache_interface.py, v1/core/kv_cache_planning.py: blocks × pages"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """Model types with caches of their own, and those that this version does not run."""
    del tp, pp
    model_type = architecture.model_type
    parts = [part for layer in architecture.layers for part in layer.parts()]
    if model_type in UNKNOWN:
        msg = (
            f"vLLM keeps {model_type} in caches with rules of their own that are not covered; use "
            "--engine model"
        )
        raise UnsupportedError(msg)
    if any(isinstance(part, StateLayer) for part in parts) and model_type not in STATE_RULES:
        msg = (
            f"vLLM 0.33.0 does not run the states of {model_type}; use --engine model or "
            "transformers"
        )
        raise UnsupportedError(msg)
    if any(isinstance(part, LatentAttention) for part in parts) and model_type not in LATENT_TYPES:
        msg = f"vLLM keeps no latents for {model_type}, which is not covered; use --engine model"
        raise UnsupportedError(msg)
    if any(isinstance(part, CrossAttention) for part in parts) and model_type != "whisper":
        msg = (
            f"vLLM 0.33.0 runs Whisper alone of models with cross attention, not {model_type}; use "
            "--engine model or transformers"
        )
        raise UnsupportedError(msg)
    windows = {isinstance(part, SlidingAttention) for part in parts}
    if len(windows) > 1 and model_type in ALL_OR_NO_WINDOWS:
        msg = f"vLLM runs {model_type} with windows in all layers or in none; use --engine model"
        raise UnsupportedError(msg)
    if all(isinstance(part, NoCache) for part in parts):
        msg = f"vLLM keeps no cache for {model_type}: no layer has one"
        raise UnsupportedError(msg)


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """The KV quantisation that a checkpoint declares, else the model's dtype."""
    return architecture.cache_dtype


def check_dtype(dtype: StorageFormat) -> None:
    """int8 and int4 are int8_per_token_head and int4_per_token_head there."""
    if dtype.name not in FORMATS_TAKEN:
        msg = f"vLLM keeps a cache in {', '.join(FORMATS_TAKEN)}, not {dtype.name}"
        if "_" in dtype.name:
            msg += "; llama.cpp does"
        raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One cache of one layer on one rank: `page_bytes` for a block, of which `used_bytes` hold
    something.

    A sequence takes `fixed_blocks`, else ceil(min(tokens, `limit`) / `block_tokens`) +
    `extra_blocks`. `rows` is what a token is made of, which tells alike layers from others.
    """

    kind: str
    page_bytes: int
    used_bytes: int
    block_tokens: int
    rows: tuple[int, ...] = ()
    limit: int | None = None
    extra_blocks: int = 0
    fixed_blocks: int | None = None

    FULL: ClassVar[str] = "full"
    LATENT: ClassVar[str] = "latent"
    WINDOW: ClassVar[str] = "window"
    CHUNK: ClassVar[str] = "chunk"
    CROSS: ClassVar[str] = "cross"
    STATES: ClassVar[str] = "states"

    def blocks(self, tokens: int) -> int:
        """Blocks that a sequence may hold."""
        if self.fixed_blocks is not None:
            return self.fixed_blocks
        held = tokens if self.limit is None else min(tokens, self.limit)
        return ceil_div(held, self.block_tokens) + self.extra_blocks

    def slots(self) -> tuple[Any, ...]:
        """What must be the same for layers of different pages to share a group."""
        kind = self.FULL if self.kind == self.LATENT else self.kind
        page = self.page_bytes if self.kind == self.STATES else 0
        return kind, self.block_tokens, self.limit, self.fixed_blocks, page

    def of_page(self, page_bytes: int) -> Self:
        """The same cache in pages of this size, the largest there is."""
        if page_bytes == self.page_bytes:
            return self
        ratio, rest = divmod(page_bytes, self.page_bytes)
        if self.kind != self.STATES and not rest:
            return replace(
                self,
                page_bytes=page_bytes,
                used_bytes=self.used_bytes * ratio,
                block_tokens=self.block_tokens * ratio,
            )
        if self.kind == self.LATENT:
            msg = (
                f"vLLM cannot pad a latent's page of {self.page_bytes:,} B to {page_bytes:,} B "
                "beside other layers; use --engine model"
            )
            raise UnsupportedError(msg)
        return replace(self, page_bytes=page_bytes)


class Group(NamedTuple):
    """Layers that share blocks; all in the bucket of the same spec. `padding` slots are empty."""

    spec: Spec
    num_layers: int
    padding: int


class Groups(NamedTuple):
    """How specs become blocks: `changed` gives each spec the page it is stored in."""

    groups: tuple[Group, ...]
    changed: Mapping[Spec, Spec]
    bytes_per_block: int


def group_specs(specs: Sequence[Spec]) -> Groups:
    """One group where all layers need the same slots, else groups of equally many equal pages."""
    counts = Counter(specs)
    if len({spec.slots() for spec in counts}) == 1:
        size = sum(spec.page_bytes for spec in specs)
        group = Group(specs[0], len(specs), 0)
        return Groups((group,), {spec: spec for spec in counts}, size)
    page_bytes = max(spec.page_bytes for spec in counts)
    changed = {spec: spec.of_page(page_bytes) for spec in counts}
    buckets: Counter[Spec] = Counter()
    for spec, count in counts.items():
        buckets[changed[spec]] += count
    fewest, most = min(buckets.values()), max(buckets.values())
    group_size = most if 2 * most < 3 * fewest else fewest
    groups = []
    for spec, count in buckets.items():
        number = ceil_div(count, group_size)
        for index in range(number):
            held = ceil_div(count - index, number)
            groups.append(Group(spec, held, group_size - held))
    return Groups(tuple(groups), changed, group_size * page_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksLayer(PlainLayer):
    """Pages of a layer; `copies` is how many ranks keep something different. Without `layer` it is
    the empty place of a group that has fewer layers than the others.
    """

    layer: Layer | None
    spec: Spec
    copies: int

    @property
    def kind(self) -> str:
        """`full_attention_blocks`, or `padding`."""
        return f"{self.layer.kind}_blocks" if self.layer else "padding"

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """A page for each block of each sequence."""
        del dtype
        return batch * self.copies * self.spec.blocks(tokens) * self.spec.page_bytes

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def shard(self, tp: int) -> Self:
        """One rank's page."""
        del tp
        return replace(self, copies=1)

    def keeps(self) -> str:
        """What a block holds."""
        if self.layer is None:
            return "nothing (fills up a group of layers)"
        kept = self.layer.keeps()
        if self.spec.kind == Spec.STATES:
            return f"{kept}, in pages of {self.spec.page_bytes:,} B"
        return f"{kept}, in blocks of {self.spec.block_tokens:,} tokens"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Blocks × bytes of a page on a rank."""
        del dtype
        page = f"{self.spec.page_bytes:,} B"
        if self.copies > 1:
            page = f"{self.copies} × {page}"
        return f"{self.spec.blocks(tokens):,} blocks × {page} ({self.keeps()})"


class Capacity(NamedTuple):
    """What vLLM prints of a pool. `tokens` and `max_concurrency` are its "GPU KV cache size" and
    "Maximum concurrency"; `needed_bytes` is what one request of `max_model_len` needs, beside one
    block that is never used; `fits` says whether the engine starts.
    """

    num_blocks: int
    tokens: int
    max_concurrency: float
    needed_bytes: int
    fits: bool


class Pool(NamedTuple):
    """Blocks of one rank. `block_size` is that of attention layers, 0 where there are none;
    `bytes_per_block` counts all layers of a group.
    """

    bytes_per_block: int
    blocks_per_request: int
    num_groups: int
    block_size: int
    max_model_len: int

    @property
    def needed_bytes(self) -> int:
        """For one request of `max_model_len`."""
        return self.bytes_per_block * self.blocks_per_request

    def capacity(self, available_bytes: int) -> Capacity:
        """What a rank with this much memory for its cache holds.

        In floating point where vLLM has it, so that the same figures come out.
        """
        num_blocks = max(available_bytes, 0) // self.bytes_per_block
        concurrency = num_blocks / self.blocks_per_request
        return Capacity(
            num_blocks=num_blocks,
            tokens=int(concurrency * self.max_model_len),
            max_concurrency=round(concurrency, 2),
            needed_bytes=self.needed_bytes,
            fits=self.needed_bytes <= available_bytes - self.bytes_per_block,
        )


def pool(architecture: Architecture, plan: Plan) -> Pool:
    """Blocks and requests of a rank, for requests of `max_model_len`, else of the plan's tokens.

    Of pipeline stages the largest is meant, as in a report.
    """
    check_point(architecture, plan)
    layout = _layout(architecture, plan)
    length = plan.options["max_model_len"] or plan.tokens
    bytes_per_block = layout.groups.bytes_per_block
    if plan.pp > 1:
        pages = [sum(layout.pages(layer)) for layer in layout.layers]
        bytes_per_block = _largest_stage(pages, plan.pp)
    return Pool(
        bytes_per_block=bytes_per_block,
        blocks_per_request=sum(group.spec.blocks(length) for group in layout.groups.groups),
        num_groups=len(layout.groups.groups),
        block_size=layout.block_tokens,
        max_model_len=length,
    )


def _largest_stage(pages: Sequence[int], pp: int) -> int:
    if pp > len(pages):
        msg = f"--pp {pp} is more stages than the model has layers ({len(pages)})"
        raise UnsupportedError(msg)
    sizes, start = [], 0
    for stage in range(pp):
        end = start + ceil_div(len(pages) - start, pp - stage)
        sizes.append(sum(pages[start:end]))
        start = end
    return max(sizes)


def counts_scales(architecture: Architecture, plan: Plan) -> bool:
    """Whether rows have scales: of each token and head, or in packed latents."""
    if plan.dtype.name != "fp8" or plan.options["per_token_head"]:
        return plan.dtype.name in ("fp8", "int8", "int4")
    parts = (part for layer in architecture.layers for part in layer.parts())
    return bool(plan.options["fp8_ds_mla"]) and any(isinstance(part, IndexKeys) for part in parts)


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """Pages of each layer, those of prediction layers, and what groups are padded with."""
    if plan is None:
        use = auto_dtype(architecture)
        if isinstance(use, ConfigError):
            raise use
        defaults = {name: option.default for name, option in OPTIONS.items()}
        plan = Plan(1, 1, storage_format(str(use.value)), 1, 1, defaults)
    return _layout(architecture, plan).laid_out


def _each_once(layers: Sequence[Layer]) -> Iterable[Layer]:
    """Each object of them: families repeat one."""
    return {id(layer): layer for layer in layers}.values()


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The decoder's and prediction layers, with the spec of each of their parts."""

    tp: int
    layers: tuple[Layer, ...]
    specs: Mapping[Layer, Spec]
    groups: Groups
    block_tokens: int
    copies: Mapping[Layer, int]
    shown: Mapping[Layer, Layer]

    @cached_property
    def laid_out(self) -> tuple[Layer, ...]:
        """The layers as they are stored, and the padding."""
        padding = tuple(
            BlocksLayer(layer=None, spec=group.spec, copies=self.tp)
            for group in self.groups.groups
            for _ in range(group.padding)
        )
        kept = {id(layer): layer.each(self.stored) for layer in _each_once(self.layers)}
        return tuple(kept[id(layer)] for layer in self.layers) + padding

    def stored(self, part: Layer) -> Layer:
        """A part as it is stored."""
        if part not in self.specs:
            return part
        return BlocksLayer(
            layer=self.shown[part],
            spec=self.groups.changed[self.specs[part]],
            copies=self.copies[part],
        )

    def pages(self, layer: Layer) -> Iterable[int]:
        """Bytes of a page of each part."""
        for part in layer.parts():
            if part in self.specs:
                yield self.groups.changed[self.specs[part]].page_bytes


def check_point(architecture: Architecture, plan: Plan) -> None:
    """No request is longer than `max_model_len`, and no more than `max_num_seqs` run at once."""
    del architecture
    most = plan.options["max_num_seqs"]
    if most is not None and plan.batch > most:
        msg = (
            f"vLLM runs {most:,} requests at once, not {plan.batch:,}; its option "
            f"max_num_seqs={plan.batch} takes more"
        )
        raise InputError(msg)
    length = plan.options["max_model_len"]
    if length is not None and 0 < length < plan.tokens:
        msg = (
            f"vLLM takes no {plan.tokens:,} tokens with max_model_len {length:,}; leave "
            "max_model_len out or make it larger"
        )
        raise InputError(msg)


def _layout(architecture: Architecture, plan: Plan) -> _Layout:
    """It is the same for every length and batch."""
    options = tuple(plan.options.items())
    return _layout_of(Same(architecture), plan.dtype, plan.tp, plan.pp, options)


@lru_cache(maxsize=64)
def _layout_of(
    same: Same[Architecture],
    dtype: StorageFormat,
    tp: int,
    pp: int,
    options: tuple[tuple[str, Any], ...],
) -> _Layout:
    """Remembered: a search goes over many lengths."""
    architecture, plan = same.it, Plan(1, 1, dtype, tp, pp, dict(options))
    refuse(architecture, tp=tp, pp=pp)
    settings = _Settings.read(architecture, plan)
    layers = architecture.layers + settings.prediction
    parts = [part for layer in layers for part in layer.parts() if not isinstance(part, NoCache)]
    kinds = list(dict.fromkeys(parts))
    block_tokens, page_bytes = settings.block(kinds)
    specs = {part: settings.spec(part, block_tokens, page_bytes) for part in kinds}
    groups = group_specs([specs[part] for part in parts])
    if len(groups.groups) > 1 and plan.pp > 1:
        msg = (
            f"vLLM shares blocks among {len(groups.groups)} groups of {architecture.model_type}'s "
            "layers, whose pipeline stages are not covered; leave --pp out"
        )
        raise UnsupportedError(msg)
    attends = any(not isinstance(part, StateLayer) for part in kinds)
    return _Layout(
        tp=tp,
        layers=layers,
        specs=specs,
        groups=groups,
        block_tokens=block_tokens if attends else 0,
        copies={part: _copies(part, plan.tp) for part in kinds},
        shown={
            part: settings.kept_states(part) if isinstance(part, StateLayer) else part
            for part in kinds
        },
    )


def _copies(part: Layer, tp: int) -> int:
    """How many different shards there are among the ranks."""
    if isinstance(part, HeadsLayer):
        return min(tp, part.kv_heads)
    return tp if isinstance(part, StateLayer) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """A plan's options, with what follows from them and the model."""

    tp: int
    dtype: StorageFormat
    compute: StorageFormat
    options: Mapping[str, Any]
    rule: _StateRule
    align: bool
    checkpoints: int
    indexed: bool
    prediction: tuple[Layer, ...]
    num_speculative_tokens: int
    in_flight_tokens: int

    @classmethod
    def read(cls, architecture: Architecture, plan: Plan) -> Self:
        """Raises InputError for options that cannot be, UnsupportedError for those not covered."""
        options = plan.options
        for name in ("block_size", "max_num_batched_tokens", "max_model_len"):
            if options[name] == 0:
                msg = f"vllm option {name} must be at least 1"
                raise InputError(msg)
        prediction: tuple[Layer, ...] = ()
        speculative = options["num_speculative_tokens"]
        if options["mtp"]:
            declared = architecture.prediction.declared
            prediction = architecture.prediction.layers(max(declared, 1), architecture.model_type)
            speculative = speculative or declared
        parts = [part for layer in architecture.layers for part in layer.parts()]
        if len(prediction) > 1 and any(isinstance(part, SlidingAttention) for part in parts):
            msg = "vLLM keeps windows longer for several prediction layers, which is not covered"
            raise UnsupportedError(msg)
        rule = STATE_RULES.get(architecture.model_type, _StateRule())
        has_states = any(isinstance(part, StateLayer) for part in parts)
        caching = options["enable_prefix_caching"]
        if caching is None:
            caching = any(not isinstance(part, StateLayer | NoCache) for part in parts)
        align = has_states and caching
        batches = plan.pp + 1 if options["async_scheduling"] else plan.pp
        return cls(
            tp=plan.tp,
            dtype=plan.dtype,
            compute=_compute_format(architecture, plan.dtype),
            options=options,
            rule=rule,
            align=align,
            checkpoints=_checkpoints(architecture, options, rule) if align else 0,
            indexed=any(isinstance(part, IndexKeys) for part in parts),
            prediction=prediction,
            num_speculative_tokens=speculative,
            in_flight_tokens=batches * options["max_num_batched_tokens"],
        )

    def block(self, parts: Sequence[Layer]) -> tuple[int, int]:
        """Tokens of an attention block, and bytes of a page of states (0 where nothing pads it).

        Beside states a block is as long as it must be for its page to hold all of them.
        """
        multiple = INDEXER_BLOCK_TOKENS if self.indexed else BLOCK_TOKENS
        block_tokens = self.options["block_size"] or multiple
        if block_tokens % multiple:
            msg = f"vllm option block_size must be a multiple of {multiple}, not {block_tokens}"
            raise InputError(msg)
        states = [part for part in parts if isinstance(part, StateLayer)]
        attention = [part for part in parts if not isinstance(part, StateLayer)]
        if not states or not attention:
            return block_tokens, 0
        token_bytes = {self.token_bytes(part) for part in attention}
        if len(token_bytes) > 1 or len(states) > 1:
            msg = "vLLM is not covered for several kinds of attention or states beside each other"
            raise UnsupportedError(msg)
        (per_token,) = token_bytes
        step = block_tokens
        if any(isinstance(part, LatentAttention) for part in attention):
            step = max(step, LATENT_HYBRID_TOKENS)
        if self.align and self.checkpoints:
            step = lcm(step, self.rule.alignment)
        needed = step * ceil_div(self.state_bytes(states[0]), step * per_token)
        needed = ceil_div(needed, BLOCK_TOKENS) * BLOCK_TOKENS
        block_tokens = max(block_tokens, needed)
        return block_tokens, block_tokens * per_token

    def spec(self, part: Layer, block_tokens: int, page_bytes: int) -> Spec:
        """How vLLM describes the cache of this part of a layer on a rank."""
        if isinstance(part, StateLayer):
            used = self.state_bytes(part)
            copies = (2 + self.checkpoints if self.align else 1) + self.num_speculative_tokens
            return Spec(
                kind=Spec.STATES,
                page_bytes=page_bytes or used,
                used_bytes=used,
                block_tokens=block_tokens,
                fixed_blocks=copies,
            )
        page = block_tokens * self.token_bytes(part)
        spec = Spec(
            kind=Spec.FULL,
            page_bytes=page,
            used_bytes=page,
            block_tokens=block_tokens,
            rows=_rows(part),
        )
        if type(part) in (LatentAttention, IndexKeys):
            return replace(spec, kind=Spec.LATENT)
        if isinstance(part, CrossAttention):
            blocks = ceil_div(self.options["max_num_batched_tokens"], block_tokens)
            return replace(spec, kind=Spec.CROSS, fixed_blocks=blocks)
        if isinstance(part, ChunkedAttention):
            return replace(spec, kind=Spec.CHUNK, limit=part.window + self.in_flight_tokens)
        if isinstance(part, SlidingAttention):
            limit = part.window - 1 + self.in_flight_tokens
            return replace(spec, kind=Spec.WINDOW, limit=limit, extra_blocks=1)
        if isinstance(part, FullAttention):
            return spec
        raise _not_covered(part)

    def token_bytes(self, part: Layer) -> int:
        """Bytes of a token in one layer on a rank."""
        if isinstance(part, HeadsLayer):
            heads = per_rank(part.kv_heads, self.tp, what="KV heads")
            return heads * self._head_bytes(part.key_dim, part.value_dim or part.key_dim)
        if isinstance(part, IndexKeys) and part.storage == IndexKeys.FP8_SCALED:
            return part.key_bytes(self.dtype)
        if isinstance(part, LatentAttention):
            return self._latent_bytes(part)
        raise _not_covered(part)

    def _head_bytes(self, key_dim: int, value_dim: int) -> int:
        """K and V of one head, with scales where the format has them."""
        size = self.dtype.row_bytes(key_dim) + self.dtype.row_bytes(value_dim)
        if self.dtype.name == "nvfp4" and key_dim != value_dim:
            msg = "vLLM keeps no nvfp4 K and V of different widths; choose another --kv-dtype"
            raise UnsupportedError(msg)
        return size + 2 * SCALE_BYTES * self._per_token_head()

    def _per_token_head(self) -> bool:
        name = self.dtype.name
        return name in ("int8", "int4") or (name == "fp8" and self.options["per_token_head"])

    def _latent_bytes(self, part: LatentAttention) -> int:
        """A latent and its rotary key: in an opaque row where sparse kernels want one."""
        name = self.dtype.name
        packed = self.indexed and (
            name == "nvfp4" or (name == "fp8" and self.options["fp8_ds_mla"])
        )
        if self._per_token_head() or (name == "nvfp4" and not packed):
            msg = f"vLLM keeps no such latents in {name}; choose another --kv-dtype"
            raise UnsupportedError(msg)
        if not packed:
            return self.dtype.row_bytes(part.latent_dim + part.rope_dim)
        if (part.latent_dim, part.rope_dim) != (512, 64):
            msg = f"vLLM packs {name} latents of 512 + 64 values only; choose another --kv-dtype"
            raise UnsupportedError(msg)
        return DS_MLA_BYTES[name]

    def kept_states(self, part: StateLayer) -> StateLayer:
        """The states as vLLM keeps them: formats, and columns for drafted tokens."""
        recurrent = self.options["mamba_ssm_cache_dtype"] or self.rule.recurrent
        drafted = self.num_speculative_tokens if self.rule.drafts else 0

        def kept(state: State) -> State:
            if not state.name.startswith("conv"):
                return state._replace(dtype=recurrent or self.compute.name)
            *channels, columns = state.shape
            return state._replace(dtype=self.compute.name, shape=(*channels, columns + drafted))

        return replace(part, states=tuple(kept(state) for state in part.states))

    def state_bytes(self, part: StateLayer) -> int:
        """All states of a sequence in one layer on a rank."""
        for state in part.states:
            if state.shape[0] % self.tp and state.splits != "groups":
                msg = f"{state.shape[0]} {state.splits} are not split evenly over --tp {self.tp}"
                raise UnsupportedError(msg)
        shard = self.kept_states(part).shard(self.tp)
        return shard.num_bytes(tokens=1, batch=1, dtype=self.compute)


def _rows(part: Layer) -> tuple[int, ...]:
    """What tells layers with pages of one size from each other."""
    if isinstance(part, HeadsLayer):
        return part.rows()
    return (part.dim,) if isinstance(part, IndexKeys) else ()


def _not_covered(part: Layer) -> UnsupportedError:
    return UnsupportedError(
        f"vLLM is not covered for layers of kind {part.kind}; use --engine model"
    )


def _compute_format(architecture: Architecture, dtype: StorageFormat) -> StorageFormat:
    """What the model computes in: the cache's format where it can, else the config's."""
    if dtype.name in COMPUTE_DTYPES:
        return dtype
    use = architecture.model_dtype
    if isinstance(use, ConfigError):
        raise use
    return storage_format(str(use.value))


def _checkpoints(architecture: Architecture, options: Mapping[str, Any], rule: _StateRule) -> int:
    """Pages of states at the end of a prefill that prefix caching keeps."""
    given = options["num_prefill_checkpoint_blocks"]
    found = rule.checkpoints if given is None else given
    if found is None:
        msg = (
            f"whether vLLM keeps a checkpoint of {architecture.model_type}'s states depends on its "
            "kernel: give num_prefill_checkpoint_blocks (0 or 1) or enable_prefix_caching=false"
        )
        raise UnsupportedError(msg)
    return int(found)


def room(
    architecture: Architecture, plan: Plan, available_bytes: int
) -> dict[str, int | float | bool]:
    """What a rank makes of so many bytes, by vLLM's names, and whether it starts: one request of
    `max_model_len` must fit beside a block that is never used.
    """
    found = pool(architecture, plan).capacity(available_bytes)
    return {
        "num_gpu_blocks": found.num_blocks,
        "kv_cache_size_tokens": found.tokens,
        "kv_cache_max_concurrency": found.max_concurrency,
        "needed_for_one_request_bytes": found.needed_bytes,
        "starts": found.fits,
    }


def holds(architecture: Architecture, plan: Plan, needed_bytes: int, available_bytes: int) -> bool:
    """Whether the engine starts, and the requests' blocks are there beside the one that is never
    used.
    """
    here = (plan.tokens, plan.dtype, plan.tp, plan.pp)
    block, least = _start(Same(architecture), Same(plan.options), *here)
    return max(needed_bytes, least) <= (available_bytes // block - 1) * block


@lru_cache(maxsize=8)
def _start(
    architecture: Same[Architecture],
    options: Same[Mapping[str, Any]],
    tokens: int,
    dtype: StorageFormat,
    tp: int,
    pp: int,
) -> tuple[int, int]:
    """Bytes of a block, and of the blocks without which the engine does not start; a search asks
    for one length many times.
    """
    blocks = pool(architecture.it, Plan(tokens, 1, dtype, tp, pp, options.it))
    return blocks.bytes_per_block, blocks.needed_bytes


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None: the pool is there from the start."""
    del layers, tokens, batch, dtype
    return {}
