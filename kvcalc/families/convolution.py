"""Short convolutions beside attention: LFM2 (arXiv:2511.23404) and LFM3.

A convolution layer keeps the last `conv_L_cache` - 1 inputs of each channel, and nothing for a
token (modeling_lfm2.py, transformers 5.23.0).
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, windowed
from kvcalc.families._kinds import CONVOLUTION, FULL, SLIDING, build_layers, layer_kinds
from kvcalc.families._states import convolution
from kvcalc.layers import Layer
from kvcalc.layers.states import state_layer

SOURCE = "K and V in attention layers, conv_L_cache - 1 inputs in convolutions (arXiv:2511.23404)"

MODEL_TYPES = frozenset({"lfm2", "lfm2_moe", "lfm3"})

UNDERSTANDS = frozenset({"layer_types", "full_attn_idxs", "conv_L_cache", "sliding_window"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    if config.model_type == "lfm3":
        cycle = (CONVOLUTION, CONVOLUTION, FULL, CONVOLUTION)
        return [SLIDING if index and index % 4 == 0 else cycle[index % 4] for index in range(count)]
    full = config.numbers("full_attn_idxs")
    if full is None:
        return (FULL,) * count
    return [FULL if index in full else CONVOLUTION for index in range(count)]


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    def short_convolution() -> Layer:
        columns = config.count("conv_L_cache") + extra_columns
        return state_layer([convolution(config.count("hidden_size"), columns)], kind=CONVOLUTION)

    return build_layers(
        config,
        layer_kinds(config, _kinds),
        {
            FULL: lambda: full_attention(config),
            SLIDING: lambda: windowed(full_attention(config), config.count("sliding_window")),
            CONVOLUTION: short_convolution,
        },
    )
