"""RG-LRU beside local attention: RecurrentGemma (Griffin, arXiv:2402.19427).

A recurrent block keeps a convolution over `lru_width` channels and one float32 value of each; an
attention block keeps a window (modeling_recurrent_gemma.py, transformers 5.23.0).
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import LINEAR, SLIDING, build_layers, layer_kinds
from kvcalc.families._states import FLOAT32, convolution
from kvcalc.layers import Layer
from kvcalc.layers.states import State, state_layer

SOURCE = "a window in attention blocks, a constant state in recurrent blocks (arXiv:2402.19427)"

MODEL_TYPES = frozenset({"recurrent_gemma"})

UNDERSTANDS = frozenset({"layer_types", "layers_block_type", "block_types", "sliding_window"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    blocks = config.names("block_types")
    if not blocks or set(blocks) - {"recurrent", "attention"}:
        raise config.wrong("block_types", blocks, "a list of recurrent and attention")
    cycle = [LINEAR if block == "recurrent" else SLIDING for block in blocks]
    return [cycle[index % len(cycle)] for index in range(count)]


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps once it decodes: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    def recurrent() -> Layer:
        width = config.optional_count("lru_width") or config.count("hidden_size")
        columns = config.count("conv1d_width") + extra_columns
        return state_layer([convolution(width, columns), State("lru", (width,), FLOAT32)])

    return build_layers(
        config,
        layer_kinds(config, _kinds, key="layers_block_type"),
        {
            LINEAR: recurrent,
            SLIDING: lambda: windowed(full_attention(config), config.count("sliding_window")),
        },
    )
