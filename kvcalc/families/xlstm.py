"""xLSTM (arXiv:2405.04517): a matrix memory, a normaliser and a maximum for each head
(modeling_xlstm.py, transformers 5.23.0).
"""

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.families._heads import repeat
from kvcalc.layers import Layer
from kvcalc.layers.states import State, state_layer
from kvcalc.units import ceil_div

SOURCE = "a matrix memory for each head and sequence (arXiv:2405.04517, section 2.3)"

MODEL_TYPES = frozenset({"xlstm"})

UNDERSTANDS: frozenset[str] = frozenset()

_MULTIPLE = 64
"""Widths of queries and values are rounded up to a multiple of it."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same state in each layer."""
    heads = config.count("num_heads")
    key_dim, value_dim = (_width(config, key) // heads for key in ("qk_dim_factor", "v_dim_factor"))
    states = (
        State("memory", (heads, key_dim, value_dim), splits="heads"),
        State("normaliser", (heads, key_dim), splits="heads"),
        State("maximum", (heads, 1), splits="heads"),
    )
    return repeat(config, state_layer(states))


def _width(config: ConfigFields, key: str) -> int:
    """A factor of the hidden size, exactly, rounded up."""
    factor = config.get(key)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 64:
        raise config.wrong(key, factor, "a factor from 0 to 64")
    numerator, denominator = factor.as_integer_ratio()
    width = ceil_div(config.count("hidden_size") * numerator, denominator)
    if width < 1:
        msg = f"config has {key} {factor}, which leaves no width"
        raise ConfigError(msg)
    return ceil_div(width, _MULTIPLE) * _MULTIPLE
