"""llama.cpp: cells of a context, allocated when it is made, whatever comes into them.

Read in `src/llama-context.cpp`, `llama-kv-cache.cpp`, `llama-kv-cache-iswa.cpp`,
`llama-kv-cache-dsa.cpp`, `llama-memory-recurrent.cpp` and `llama-hparams.cpp` of the llama.cpp that
llama-cpp-python 0.3.36 ships (August 2026), and run: the tests build it and compare its log.

- `n_ctx` is padded to 256. A unified cache is one stream of that many cells; else each of
  `n_seq_max` sequences has a stream of its own of `n_ctx / n_seq_max`, padded to 256 again.
- A layer keeps a row of K and one of V for each cell. Window layers, in architectures that llama.cpp
  gives windows, have pad(min(cells, window × (unified ? n_seq_max : 1) + n_ubatch), 256) cells, or
  all with `swa_full`. In other architectures (Mistral, Phi-3) windows are ignored.
- Without flash attention V is transposed, and as wide in every layer as in the widest.
- Latents are K alone; a file converted before April 2025 keeps K and V of every head (`mla`
  false). The lightning indexer's key is a row of K.
- Recurrent layers keep f32 states for each of `n_seq_max` × (1 + `n_rs_seq`) sequences.

Options are those of the library (`llama_context_params`); `llama-server` has `swa_full` off, the
library on: here it is off unless asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self, cast

from kvcalc.config import FieldUse
from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.engines import Option, Plan
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import FullAttention, HeadsLayer, LatentAttention, Layer, PlainLayer, Windowed
from kvcalc.layers.mixed import IndexKeys, NoCache
from kvcalc.layers.states import StateLayer
from kvcalc.units import ceil_div

OPTIONS: Mapping[str, Option] = {
    "n_ctx": Option("count", None, "cells asked for, for all sequences; else seq × n_seq_max"),
    "n_seq_max": Option("count", None, "sequences (-np); else the batch"),
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

FORMATS_TAKEN = ("fp32", "fp16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

WINDOWED = frozenset(
    """
    afmoe cohere2 cohere2_moe dots3_note dots3_note_text exaone4 exaone4_5 exaone_moe gemma2 gemma3
    gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gpt_oss granite_swa
    granitemoe_swa laguna lfm2 lfm2_moe llama4 llama4_text mellum mimo_v2_flash olmo3 plamo3
    smallthinker step3p5 step3p7
    """.split()
)
"""Model types whose architecture has a window in `src/models`; all others see everything."""

UNKNOWN = frozenset({"deepseek_v4", "hy_v4", "minimax_m3_vl", "minimax_m3", "qwen4_exp", "kimi_k3"})
"""Model types with a cache class of their own that is not covered here."""


def source() -> str:
    """The files, and what was checked."""
    return "llama.cpp src/llama-kv-cache*.cpp (llama-cpp-python 0.3.36): cells × rows, f32 states"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """What one machine holds in all; how layers are split over devices does not change it."""
    if (tp, pp) != (1, 1):
        msg = "llama.cpp splits layers over devices without changing what all of them hold: leave "
        msg += "--tp and --pp out"
        raise UnsupportedError(msg)
    if architecture.model_type in UNKNOWN:
        msg = (
            f"llama.cpp keeps {architecture.model_type} in a cache class of its own that is not "
            "covered; use --engine model"
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

    def streams(self, tokens: int, batch: int) -> tuple[int, int]:
        """Streams, and cells of each."""
        sequences = self.n_seq_max or batch
        n_ctx = _padded(self.n_ctx or tokens * sequences)
        streams = 1 if self.unified else sequences
        return streams, _padded(n_ctx // streams)

    def check(self, tokens: int, batch: int) -> None:
        """Raise InputError where a context of the user's is too short."""
        streams, cells = self.streams(tokens, batch)
        needed = tokens * batch if self.unified else tokens
        if cells < needed or (self.n_seq_max or batch) < batch:
            msg = (
                f"llama.cpp: {streams} × {cells:,} cells do not hold {batch} × {tokens:,} tokens; "
                "leave n_ctx and n_seq_max out or make them larger"
            )
            raise InputError(msg)

    def window_cells(self, tokens: int, batch: int, window: int) -> int:
        """Cells of a stream of a window layer."""
        _, cells = self.streams(tokens, batch)
        sequences = (self.n_seq_max or batch) if self.unified else 1
        return _padded(min(cells, window * sequences + self.n_ubatch))


def _padded(cells: int) -> int:
    return ceil_div(cells, CELLS) * CELLS


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsLayer(PlainLayer):
    """Rows of K and V for each cell; `window` is None where all are kept, and `value_dim` what V is
    padded to.
    """

    layer: HeadsLayer | LatentAttention | IndexKeys
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


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """Cells and states. Raises UnsupportedError for layers that llama.cpp keeps in no such way, and
    for a quantised V without flash attention.
    """
    options = plan.options if plan else {name: option.default for name, option in OPTIONS.items()}
    types = {name: _type(options[name]) for name in ("type_k", "type_v")}
    stored_v = types["type_v"] or (plan.dtype if plan else None)
    if not options["flash_attn"] and stored_v and stored_v.block_elements > 1:
        msg = f"llama.cpp keeps V in {stored_v.name} with flash attention only"
        raise UnsupportedError(msg)
    context = Context(
        n_ctx=options["n_ctx"],
        n_seq_max=options["n_seq_max"],
        n_ubatch=options["n_ubatch"],
        unified=options["kv_unified"],
    )
    if plan:
        context.check(plan.tokens, plan.batch)
    layers = architecture.layers
    if not options["mla"]:
        layers = tuple(layer.each(_expanded) for layer in layers)
    widest_v = max((_widths(part)[1] for layer in layers for part in layer.parts()), default=0)
    windowed = architecture.model_type in WINDOWED and not options["swa_full"]

    def change(part: Layer) -> Layer:
        if isinstance(part, NoCache):
            return part
        if isinstance(part, StateLayer):
            return StatesOfSequences(
                layer=part, rows=1 + options["n_rs_seq"], n_seq_max=options["n_seq_max"]
            )
        if not isinstance(part, HeadsLayer | LatentAttention | IndexKeys):
            msg = f"llama.cpp is not covered for layers of kind {part.kind}; use --engine model"
            raise UnsupportedError(msg)
        key_width, value_width = _widths(part)
        return CellsLayer(
            layer=part,
            context=context,
            window=part.window if windowed and isinstance(part, Windowed) else None,
            key_width=key_width,
            value_width=value_width if options["flash_attn"] or not value_width else widest_v,
            **types,
        )

    return tuple(layer.each(change) for layer in layers)


def _type(name: str | None) -> StorageFormat | None:
    """A format that a cache can have; None where the KV dtype says it."""
    if name is None:
        return None
    check_dtype(FORMATS[name])
    return FORMATS[name]


def _expanded(part: Layer) -> Layer:
    return part.expanded() if isinstance(part, LatentAttention) else part


def _widths(part: Layer) -> tuple[int, int]:
    """Values of a row of K and of V: a latent with its rotary key is K alone, so is an index key."""
    if isinstance(part, IndexKeys):
        return part.dim, 0
    if isinstance(part, LatentAttention):
        return part.latent_dim + part.rope_dim, 0
    if isinstance(part, FullAttention | HeadsLayer):
        return part.kv_heads * part.key_dim, part.kv_heads * (part.value_dim or part.key_dim)
    return 0, 0


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None: everything is there from the start."""
    del layers, tokens, batch, dtype
    return {}
