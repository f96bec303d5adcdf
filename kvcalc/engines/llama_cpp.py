"""llama.cpp: cells of a context, allocated when it is made, whatever comes into them.

Read in `src/llama-context.cpp`, `llama-model.cpp`, `llama-kv-cache*.cpp`,
`llama-memory-recurrent.cpp`, `llama-hparams.cpp` and `src/models` of the llama.cpp that
llama-cpp-python 0.3.36 ships (August 2026), and run: a test compares what it logs.

- `n_ctx` is padded to 256. A unified cache is one stream of that many cells; else each of
  `n_seq_max` sequences has a stream of its own of `n_ctx / n_seq_max`, padded to 256 again.
- A layer keeps a row of K and one of V for each cell. Window layers, in architectures that
  llama.cpp gives windows, have pad(min(cells, window × (unified ? n_seq_max : 1) + n_ubatch), 256)
  cells, or all with `swa_full`. In other architectures (Mistral, Phi-3) windows are ignored.
- Without flash attention V is transposed, and as wide in every layer as in the widest.
- Latents are K alone; a file of DeepSeek-V2 or V3 converted before April 2025 keeps K and V of
  every head (`mla` false), as MiniCPM3 always does. The lightning indexer's key is a row of K.
- Recurrent layers keep f32 states for each of `n_seq_max` × (1 + `n_rs_seq`) sequences.

Options are those of the library (`llama_context_params`); `llama-server` has `swa_full` off, the
library on: here it is off unless asked for. `llama-server` without `-np` makes 4 unified sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self, cast

from kvcalc.config import FieldUse
from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.engines import Option, Plan
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import HeadsLayer, LatentAttention, Layer, PlainLayer, Windowed
from kvcalc.layers.mixed import CrossAttention, IndexKeys, NoCache
from kvcalc.layers.states import StateLayer
from kvcalc.units import ceil_div, shown

OPTIONS: Mapping[str, Option] = {
    "n_ctx": Option("count", None, "cells asked for, for all sequences; else seq × n_seq_max"),
    "n_seq_max": Option("count", None, "sequences (-np); else the batch"),
    "n_batch": Option("count", 2048, "tokens of a logical batch (-b); n_ubatch is at most that"),
    "n_ubatch": Option("count", 512, "tokens of a physical batch (-ub)"),
    "type_k": Option("format", None, "format of K (-ctk); else the KV dtype"),
    "type_v": Option("format", None, "format of V (-ctv); else the KV dtype"),
    "kv_unified": Option("flag", False, "one stream for all sequences (-kvu)"),
    "swa_full": Option("flag", False, "window layers as long as the others (--swa-full)"),
    "flash_attn": Option("flag", True, "flash attention (-fa)"),
    "mla": Option("flag", True, "latents as such; false for files converted before April 2025"),
    "n_rs_seq": Option("count", 0, "further states for each sequence, for speculation"),
}

CELLS = 256
"""What contexts and window caches are padded to."""

MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ."""

FORMATS_TAKEN = ("fp32", "fp16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

SUPPORTED = frozenset(
    """
    afmoe apertus arcee baichuan bailing_hybrid bailing_moe bamba bitnet bloom chameleon chatglm
    cohere cohere2 cohere2_moe dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5
    ernie4_5_moe exaone exaone4 exaone4_5_text exaone_moe falcon falcon_h1 falcon_mamba gemma gemma2
    gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
    glm4v_moe_text glm4v_text glm_moe_dsa glm_ocr_text gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_dense
    hunyuan_v1_moe hunyuan_vl_text hy_v3 internlm2 internlm3 iquestcoder jais2 jamba kimi_k2
    kimi_linear laguna lfm2 lfm2_moe llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm
    minicpm3 minimax_m2 minimax_text_01 ministral3 mistral mistral4 mixtral mpt muse_glimmer_text
    nemotron nemotron-nas nemotron_h olmo olmo2 olmo3 olmoe openelm orion paddleocr_vl_text phi
    phi-msft phi3 phimoe plamo2 qwen qwen2 qwen2_5_omni_text qwen2_5_vl_text qwen2_moe qwen2_vl_text
    qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text
    qwen3_vl_text seed_oss smollm3 solar_open stablelm starcoder2 step3p5 xverse youtu youtu_vl
    """.split()
)
"""Model types whose class the converter of that release takes (`conversion/*.py`) and whose cache
class is one of those above.
"""

WINDOWED = frozenset(
    """
    afmoe cohere2 cohere2_moe exaone4 exaone4_5_text exaone_moe gemma2 gemma3_text gemma3n_text
    gemma4_text gemma4_unified_text gpt_oss granite_swa granitemoe_swa laguna lfm2 lfm2_moe
    llama4_text mellum mimo_v2_flash muse_glimmer_text olmo3 step3p5
    """.split()
)
"""Model types whose architecture has a window in `src/models`; all others see everything."""

EXPANDED = frozenset({"minicpm3"})
"""Model types whose latents are always kept as K and V of every head."""

ONCE_EXPANDED = frozenset({"deepseek_v2", "deepseek_v3"})
"""Model types that there are files of from before April 2025."""

WITH_ROLLBACK = frozenset(
    "bailing_hybrid lfm2 lfm2_moe nemotron_h qwen3_5_moe_text qwen3_5_text".split()
)
"""Model types that keep `n_rs_seq` further states; others ignore it (`llama-arch.cpp`)."""

UNFILTERED = frozenset({"nemotron-nas"})
"""Model types whose layers without attention get an empty K, and a V where V is transposed."""

MTP_KEPT = frozenset({"bailing_hybrid"})
"""Hybrid model types whose prediction layers no filter leaves out of the main context."""

LLAMA4_CHUNK = 8192
"""What `src/models/llama4.cpp` takes whatever the file says."""

EXAONE4_WITH_WINDOWS = 64
"""The depth at which `src/models/exaone4.cpp` has windows."""


def source() -> str:
    """The files, and what was checked."""
    return "llama.cpp src/llama-kv-cache*.cpp (llama-cpp-python 0.3.36): cells × rows, f32 states"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """What one machine holds in all; how layers are split over devices does not change it."""
    if (tp, pp) != (1, 1):
        msg = "llama.cpp splits layers over devices without changing what all of them hold: leave "
        msg += "--tp and --pp out"
        raise UnsupportedError(msg)
    if architecture.model_type not in SUPPORTED:
        msg = (
            f"llama.cpp (llama-cpp-python 0.3.36) does not run model_type "
            f"{shown(architecture.model_type)}, or keeps it in a way that is not covered; use "
            "--engine model"
        )
        raise UnsupportedError(msg)
    if architecture.model_type in MTP_KEPT and architecture.prediction.declared:
        msg = (
            f"llama.cpp keeps K of {architecture.model_type}'s prediction layers, too, unless its "
            "file was converted without; deciding field: num_nextn_predict_layers"
        )
        raise UnsupportedError(msg)


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """f16 whatever the model is computed in."""
    del architecture
    return FieldUse("type_k", "fp16", "llama.cpp's default")


def check_dtype(dtype: StorageFormat) -> None:
    """The types that its command line takes for a cache."""
    if dtype.name not in FORMATS_TAKEN:
        msg = f"llama.cpp keeps a cache in {', '.join(FORMATS_TAKEN)}, not {dtype.name}"
        raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is the same for all layers: `cells` of a stream are for the tokens asked for unless
    `n_ctx` says more.
    """

    n_ctx: int | None
    n_seq_max: int | None
    n_ubatch: int
    unified: bool

    def sequences(self, batch: int) -> int:
        """How many there may be."""
        return self.n_seq_max or batch

    def streams(self, tokens: int, batch: int) -> tuple[int, int]:
        """Streams, and cells of each."""
        sequences = self.sequences(batch)
        n_ctx = _padded(self.n_ctx or tokens * sequences)
        streams = 1 if self.unified else sequences
        return streams, _padded(n_ctx // streams)

    def check(self, tokens: int, batch: int) -> None:
        """Raise InputError for a context of the user's that is too short, or of too many
        sequences.
        """
        sequences = self.sequences(batch)
        if sequences > MAX_SEQUENCES:
            msg = (
                f"llama.cpp takes at most {MAX_SEQUENCES} sequences (n_seq_max), not {sequences:,}"
            )
            raise InputError(msg)
        streams, cells = self.streams(tokens, batch)
        needed = tokens * batch if self.unified else tokens
        if cells < needed or sequences < batch:
            msg = (
                f"llama.cpp: {streams} × {cells:,} cells for {sequences} sequences do not hold "
                f"{batch} × {tokens:,} tokens; leave n_ctx and n_seq_max out or make them larger"
            )
            raise InputError(msg)

    def window_cells(self, tokens: int, batch: int, window: int) -> int:
        """Cells of a stream of a window layer."""
        _, cells = self.streams(tokens, batch)
        windows = self.sequences(batch) if self.unified else 1
        return _padded(min(cells, window * windows + self.n_ubatch))


def _padded(cells: int) -> int:
    return ceil_div(cells, CELLS) * CELLS


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsLayer(PlainLayer):
    """A row of `key_width` values of K and one of `value_width` of V for each cell; `window` is
    None where all cells are kept.
    """

    layer: HeadsLayer | LatentAttention | IndexKeys | NoCache
    context: Context
    window: int | None
    key_width: int
    value_width: int
    type_k: StorageFormat | None
    type_v: StorageFormat | None

    @property
    def kind(self) -> str:
        """`full_attention_cells`."""
        if isinstance(self.layer, HeadsLayer) and self.window is None:
            return "full_attention_cells"
        return f"{cast('Layer', self.layer).kind}_cells"

    def _cells(self, tokens: int, batch: int) -> tuple[int, int]:
        streams, cells = self.context.streams(tokens, batch)
        if self.window is not None:
            cells = self.context.window_cells(tokens, batch, self.window)
        return streams, cells

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """Rows of all streams' cells."""
        streams, cells = self._cells(tokens, batch)
        row = (self.type_k or dtype).row_bytes(self.key_width)
        row += (self.type_v or dtype).row_bytes(self.value_width)
        return streams * cells * row

    def breakpoints(self) -> tuple[int, ...] | None:
        """A staircase."""
        return None

    def shard(self, tp: int) -> Self:
        """On one machine."""
        del tp
        return self

    def keeps(self) -> str:
        """Widths of the rows."""
        return f"{self.key_width} K + {self.value_width} V for a cell"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Streams × cells × rows, of one sequence alone."""
        streams, cells = self._cells(tokens, 1)
        types = f"{(self.type_k or dtype).name} and {(self.type_v or dtype).name}"
        return f"{streams} stream × {cells:,} cells × ({self.keeps()}), {types}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesOfSequences(PlainLayer):
    """Recurrent states in f32 for each sequence that there may be."""

    kind: ClassVar[str] = "recurrent_states"
    layer: StateLayer
    rows: int
    n_seq_max: int | None

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """All numbers of all states, four bytes each."""
        del tokens, dtype
        numbers = sum(prod(state.shape) for state in self.layer.states)
        return (self.n_seq_max or batch) * self.rows * numbers * FORMATS["fp32"].block_bytes

    def shard(self, tp: int) -> Self:
        """On one machine."""
        del tp
        return self

    def keeps(self) -> str:
        """The states of a sequence."""
        return f"{self.layer.keeps()}, f32"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """As many as there are rows."""
        del tokens, dtype
        return f"{self.rows} × ({self.keeps()})"


def check_point(architecture: Architecture, plan: Plan) -> None:
    """A context holds so many sequences of so many tokens."""
    _context(architecture, plan.options).check(plan.tokens, plan.batch)


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """Cells and states. Raises UnsupportedError for layers that llama.cpp keeps in no such way, and
    for a format that it cannot keep them in.
    """
    options = plan.options if plan else {name: option.default for name, option in OPTIONS.items()}
    types = {name: _type(options[name]) for name in ("type_k", "type_v")}
    context = _context(architecture, options)
    layers = _in_latents(architecture, latents=options["mla"])
    parts = [part for layer in layers for part in layer.parts()]
    if plan:
        stored = tuple(kind or plan.dtype for kind in types.values())
        _check_blocks(parts, *stored, flash=options["flash_attn"])
    widest_v = max((_widths(part)[1] for part in parts), default=0)
    windowed = _has_windows(architecture) and not options["swa_full"]
    rollback = options["n_rs_seq"] if architecture.model_type in WITH_ROLLBACK else 0

    def change(part: Layer) -> Layer:
        if isinstance(part, StateLayer):
            return StatesOfSequences(layer=part, rows=1 + rollback, n_seq_max=options["n_seq_max"])
        transposed = not options["flash_attn"] and not isinstance(part, IndexKeys | LatentAttention)
        if isinstance(part, NoCache) and not (transposed and architecture.model_type in UNFILTERED):
            return part
        if not isinstance(part, HeadsLayer | LatentAttention | IndexKeys | NoCache) or isinstance(
            part, CrossAttention
        ):
            msg = f"llama.cpp is not covered for layers of kind {part.kind}; use --engine model"
            raise UnsupportedError(msg)
        key_width, value_width = _widths(part)
        window = part.window if windowed and isinstance(part, Windowed) else None
        return CellsLayer(
            layer=part,
            context=context,
            window=window and _window(architecture, window),
            key_width=key_width,
            value_width=widest_v if transposed else value_width,
            **types,
        )

    return tuple(layer.each(change) for layer in layers)


def _context(architecture: Architecture, options: Mapping[str, Any]) -> Context:
    n_ctx = options["n_ctx"]
    if n_ctx == 0:
        n_ctx = architecture.max_tokens
        if not n_ctx:
            msg = "n_ctx 0 is the model's own maximum, which its config does not name; give n_ctx"
            raise InputError(msg)
    n_batch = options["n_batch"]
    n_ubatch = min(n_batch, options["n_ubatch"] or n_batch)
    if not n_ubatch:
        msg = "n_batch must be at least 1, not 0"
        raise InputError(msg)
    return Context(
        n_ctx=n_ctx,
        n_seq_max=options["n_seq_max"],
        n_ubatch=n_ubatch,
        unified=options["kv_unified"],
    )


def _in_latents(architecture: Architecture, *, latents: bool) -> tuple[Layer, ...]:
    """The layers with their latents as such, or expanded where the file does."""
    model_type = architecture.model_type
    if latents and model_type not in EXPANDED:
        return architecture.layers
    if not latents and model_type not in ONCE_EXPANDED | EXPANDED:
        msg = (
            f"option mla false is for files of {', '.join(sorted(ONCE_EXPANDED))}, not {model_type}"
        )
        raise UnsupportedError(msg)
    return tuple(layer.each(_expanded) for layer in architecture.layers)


def _has_windows(architecture: Architecture) -> bool:
    if architecture.model_type in ("exaone4", "exaone4_5_text"):
        return len(architecture.layers) == EXAONE4_WITH_WINDOWS
    return architecture.model_type in WINDOWED


def _window(architecture: Architecture, window: int) -> int:
    """The window that the architecture's code takes."""
    if architecture.model_type == "llama4_text":
        return LLAMA4_CHUNK
    if architecture.model_type == "mimo_v2_flash" and any(
        field.key == "sliding_window_size" for field in architecture.fields
    ):
        return window - 1  # the field counts the tokens before the query, and is taken as it is
    return window


def _check_blocks(
    parts: Sequence[Layer], type_k: StorageFormat, type_v: StorageFormat, *, flash: bool
) -> None:
    """Raise UnsupportedError for what `llama_init_from_model` refuses: latents of two types, a
    quantised V without flash attention, heads that are not whole blocks with it.
    """
    if type_k != type_v and any(isinstance(part, LatentAttention) for part in parts):
        msg = (
            f"llama.cpp takes one type for a model with latents, not {type_k.name} for K and "
            f"{type_v.name} for V; give type_k and type_v alike"
        )
        raise UnsupportedError(msg)
    if not flash and type_v.block_elements > 1:
        msg = f"llama.cpp keeps V in {type_v.name} with flash attention only"
        raise UnsupportedError(msg)
    heads = [part for part in parts if flash and isinstance(part, HeadsLayer)]
    for part in heads:
        for name, dim, kept in (("K", part.key_dim, type_k), ("V", part.value_dim, type_v)):
            if dim % kept.block_elements:
                msg = (
                    f"llama.cpp keeps no {name} heads of {dim} in {kept.name} (blocks of "
                    f"{kept.block_elements}); choose another type_{name.lower()}"
                )
                raise UnsupportedError(msg)


def _type(name: str | None) -> StorageFormat | None:
    """A format that a cache can have; None where the KV dtype says it."""
    if name is None:
        return None
    check_dtype(FORMATS[name])
    return FORMATS[name]


def _expanded(part: Layer) -> Layer:
    return part.expanded() if isinstance(part, LatentAttention) else part


def _widths(part: Layer) -> tuple[int, int]:
    """Values of a row of K and of V: latents with their rotary key and index keys are K alone."""
    if isinstance(part, IndexKeys):
        return part.dim, 0
    if isinstance(part, LatentAttention):
        return part.latent_dim + part.rope_dim, 0
    if isinstance(part, HeadsLayer):
        return part.kv_heads * part.key_dim, part.kv_heads * (part.value_dim or part.key_dim)
    return 0, 0


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None: everything is there from the start."""
    del layers, tokens, batch, dtype
    return {}
