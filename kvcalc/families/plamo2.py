"""PLaMo-2 (arXiv:2509.04897): Mamba layers beside attention over a window, after Samba.

One layer of each `mamba_step` attends. A Mamba layer convolves x alone (B and C are projected after
the convolution) and keeps its recurrent state in float32; an attention layer keeps a window, unless
`full_attention_idx` lists it (mlx-examples llms/mlx_lm/models/plamo2.py, PFN's port of the
repository's modeling_plamo.py; the step and the shapes also in vLLM models/plamo2.py). A config
must say its window: releases differ.
"""

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.families._heads import full_attention, num_layers, windowed
from kvcalc.families._kinds import FULL, LINEAR, SLIDING, build_layers
from kvcalc.families._states import mamba2
from kvcalc.layers import Layer
from kvcalc.layers.states import state_layer

SOURCE = "a window in attention layers, a constant state in Mamba layers (arXiv:2509.04897)"

MODEL_TYPES = frozenset({"plamo2"})

UNDERSTANDS = frozenset({"mamba_d_state", "mamba_num_heads", "sliding_window"})
"""Its class copies `attention_window_size` into `sliding_window`, for vLLM."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The repository's code keeps no more than this: kernel - 1 columns and one window."""
    return build_layers(
        config,
        _kinds(config),
        {
            LINEAR: lambda: _mamba(config),
            SLIDING: lambda: windowed(full_attention(config), _window(config)),
            FULL: lambda: full_attention(config),
        },
    )


def _window(config: ConfigFields) -> int:
    window = config.optional_count("attention_window_size")
    if window is None:
        msg = (
            "model_type 'plamo2' without its window is not covered, since releases differ; "
            "deciding fields: attention_window_size, full_attention_idx"
        )
        raise UnsupportedError(msg)
    return window


def _kinds(config: ConfigFields) -> list[str]:
    count, step = num_layers(config), config.count("mamba_step")
    if step == 1:
        raise config.wrong("mamba_step", step, "a whole number from 2 on")
    full = config.numbers("full_attention_idx") or ()
    attending = range(step // 2, count, step) if count > step // 2 else (count - 1,)
    if not config.flag("mamba_enabled"):
        attending = range(count)
    return [
        LINEAR if index not in attending else FULL if index in full else SLIDING
        for index in range(count)
    ]


def _mamba(config: ConfigFields) -> Layer:
    return state_layer(
        mamba2(
            heads=config.count("mamba_num_heads"),
            head_dim=config.count("hidden_size_per_head"),
            groups=0,
            state_size=config.count("mamba_d_state"),
            columns=config.count("mamba_d_conv") - 1,
        )
    )
