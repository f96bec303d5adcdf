"""States of recurrent layers, shared by the hybrid families.

A causal convolution over `kernel` columns must keep the last kernel - 1; transformers keeps all
`kernel` of them. `columns` says which is meant.
"""

from kvcalc.config import ConfigFields
from kvcalc.layers.states import State, StateLayer, state_layer

FLOAT32 = "fp32"
"""What transformers' own kernels keep recurrent states in, whatever the model's dtype."""


def convolution(width: int, columns: int, *, name: str = "conv", splits: str = "channels") -> State:
    """The last `columns` inputs of a convolution over `width` channels."""
    return State(name, (width, columns), splits=splits)


def mamba1(*, inner: int, state_size: int, columns: int) -> tuple[State, ...]:
    """Mamba (arXiv:2312.00752): a convolution and a state of `state_size` for each channel."""
    return convolution(inner, columns), State("ssm", (inner, state_size), FLOAT32)


def mamba2(
    *, heads: int, head_dim: int, groups: int, state_size: int, columns: int
) -> tuple[State, ...]:
    """Mamba-2 (arXiv:2405.21060): the convolution runs over x, and B and C of each group."""
    return (
        State("conv x", (heads, head_dim, columns), splits="heads"),
        State("conv B, C", (groups, 2 * state_size, columns), splits="groups"),
        State("ssm", (heads, head_dim, state_size), FLOAT32, splits="heads"),
    )


def delta_rule(
    *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, columns: int
) -> tuple[State, ...]:
    """Gated delta rule (arXiv:2412.06464): the convolution runs over q, k and v; each value head
    has a state of `key_dim` × `value_dim`.
    """
    return (
        State("conv q, k", (key_heads, 2 * key_dim, columns), splits="key heads"),
        State("conv v", (value_heads, value_dim, columns), splits="value heads"),
        State("recurrent", (value_heads, key_dim, value_dim), FLOAT32, splits="value heads"),
    )


def delta_attention(*, heads: int, head_dim: int, columns: int) -> StateLayer:
    """A layer of Kimi Delta Attention (arXiv:2510.26692): as many key as value heads, all alike."""
    return state_layer(
        delta_rule(
            key_heads=heads,
            value_heads=heads,
            key_dim=head_dim,
            value_dim=head_dim,
            columns=columns,
        )
    )


def linear_attention_fields(config: ConfigFields) -> tuple[int, int, int]:
    """Heads, head width and kernel of KDA layers: `linear_attn_config`, else flat fields."""
    given = config.nested("linear_attn_config")
    names = (
        ("num_heads", "linear_num_heads"),
        ("head_dim", "linear_head_dim"),
        ("short_conv_kernel_size", "linear_conv_kernel_dim"),
    )
    heads, head_dim, kernel = (
        (given.optional_count(inner) if given else None) or config.count(flat)
        for inner, flat in names
    )
    return heads, head_dim, kernel
