"""Attention-free Mamba models: Mamba (arXiv:2312.00752), Falcon-Mamba and Mamba-2
(arXiv:2405.21060). They keep a convolution and a recurrent state, and nothing for a token.
"""

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families._heads import repeat
from kvcalc.families._states import mamba1, mamba2
from kvcalc.layers import Layer
from kvcalc.layers.states import state_layer

SOURCE = "a convolution and a recurrent state for each sequence (arXiv:2312.00752, 2405.21060)"

MODEL_TYPES = frozenset({"mamba", "falcon_mamba", "mamba2"})

UNDERSTANDS = frozenset({"state_size", "n_groups"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns of the convolution."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    columns = config.count("conv_kernel") + extra_columns
    state_size = config.count("state_size")
    inner = config.optional_count("intermediate_size")
    if config.model_type == "mamba2" or inner is None:
        inner = config.count("expand") * config.count("hidden_size")
    if config.model_type != "mamba2":
        states = mamba1(inner=inner, state_size=state_size, columns=columns)
        return repeat(config, state_layer(states))
    if config.given("ssm_cfg") is not None:
        msg = (
            "a Mamba-2 config in the format of mamba_ssm leaves its heads and groups to that "
            "library's defaults; deciding field: ssm_cfg"
        )
        raise UnsupportedError(msg)
    head_dim = config.count("head_dim")
    if config.given("num_heads") is None:
        heads = inner // head_dim
        config.by_rule("num_heads", heads)
    else:
        heads = config.count("num_heads")
    if heads * head_dim != inner:
        msg = (
            f"config has num_heads {heads} × head_dim {head_dim}, not expand × hidden_size {inner}"
        )
        raise ConfigError(msg)
    states = mamba2(
        heads=heads,
        head_dim=head_dim,
        groups=config.count("n_groups"),
        state_size=state_size,
        columns=columns,
    )
    return repeat(config, state_layer(states))
