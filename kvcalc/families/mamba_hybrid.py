"""Mamba layers beside attention: Jamba (arXiv:2403.19887), Zamba and Zamba2 (arXiv:2411.15242),
Bamba, Granite 4, Nemotron-H (arXiv:2504.03624) and Falcon-H1 (arXiv:2507.22448).

A Mamba layer keeps a convolution and a recurrent state, an attention layer its K and V; a hybrid
layer (all of Falcon-H1, some of Zamba) keeps both, an MLP or MoE layer of Nemotron-H nothing.
Field names as in the configuration classes of transformers 5.23.0.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.families._heads import full_attention
from kvcalc.families._kinds import FULL, HYBRID, LINEAR, Rule, all_of, build_layers, layer_kinds
from kvcalc.families._states import mamba1, mamba2
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import Combined, NoCache
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V in attention layers, a constant state in Mamba layers (arXiv:2405.21060)"

UNDERSTANDS = frozenset(
    """
    layer_types layers_block_type hybrid_override_pattern attn_layer_indices mamba_d_state
    sliding_window mamba_num_heads attn_layer_period ssm_state_size
    """.split()
)

_LETTERS = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}


class Recipe(NamedTuple):
    """How a model type says its kinds, its Mamba states (for a number of columns added to the
    kernel) and its attention.
    """

    kinds: Callable[[ConfigFields], Sequence[str]]
    states: Callable[[ConfigFields, int], tuple[State, ...]]
    attention: Callable[[ConfigFields], FullAttention] = full_attention


def _by(rule: Rule) -> Callable[[ConfigFields], Sequence[str]]:
    return lambda config: layer_kinds(config, rule)


def _periodic(config: ConfigFields, count: int) -> Sequence[str]:
    period, offset = config.count("attn_layer_period"), config.number("attn_layer_offset")
    return [FULL if index % period == offset else LINEAR for index in range(count)]


def _listed_indices(config: ConfigFields, count: int) -> Sequence[str]:
    indices = config.numbers("attn_layer_indices") or ()
    return [FULL if index in indices else LINEAR for index in range(count)]


def _zamba_kinds(config: ConfigFields, count: int) -> Sequence[str]:
    period, offset = config.count("attn_layer_period"), config.number("attn_layer_offset")
    rest = [HYBRID if index % period == offset else LINEAR for index in range(count - 3)]
    return [LINEAR, LINEAR, HYBRID, *rest][:count]


def _zamba2_kinds(config: ConfigFields, count: int) -> Sequence[str]:
    kinds = (
        [LINEAR]
        + ([LINEAR] * 5 + [HYBRID]) * 7
        + ([LINEAR] * 4 + [HYBRID])
        + ([LINEAR] * 3 + [HYBRID])
        + [LINEAR] * 2
    )
    if len(kinds) != count:
        msg = (
            f"config has {count} num_hidden_layers and no layers_block_type, which says their kind"
        )
        raise ConfigError(msg)
    config.by_rule("layers_block_type", "Zamba2's own pattern")
    return kinds


def _nemotron_kinds(config: ConfigFields) -> Sequence[str]:
    """The list decides how many layers there are; `num_hidden_layers` is ignored."""
    listed = config.names("layers_block_type")
    pattern = config.get("hybrid_override_pattern")
    if listed is None and pattern is not None:
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(_LETTERS):
            raise config.wrong("hybrid_override_pattern", pattern, "letters M, E, * and -")
        listed = tuple(_LETTERS[letter] for letter in pattern)
    if listed is None:
        listed = (LINEAR, "moe", FULL, "mlp")
        config.by_rule("layers_block_type", listed)
    if len(listed) > MAX_LAYERS:
        raise config.wrong("layers_block_type", listed, f"a list of at most {MAX_LAYERS:,}")
    names = {"mamba": LINEAR, "attention": FULL}
    return [names.get(kind, kind) for kind in listed]


def _mamba1_states(config: ConfigFields, extra: int) -> tuple[State, ...]:
    return mamba1(
        inner=config.count("mamba_expand") * config.count("hidden_size"),
        state_size=config.count("mamba_d_state"),
        columns=config.count("mamba_d_conv") + extra,
    )


def _inner_width(config: ConfigFields) -> int:
    own = config.optional_count("mamba_d_ssm")
    return own or config.count("mamba_expand") * config.count("hidden_size")


def _mamba2_states(heads_field: str, groups_field: str) -> Callable[..., tuple[State, ...]]:
    def states(config: ConfigFields, extra: int) -> tuple[State, ...]:
        inner, heads = _inner_width(config), config.count(heads_field)
        if inner % heads:
            msg = f"config has {heads} {heads_field}, which do not divide its Mamba width {inner}"
            raise ConfigError(msg)
        return mamba2(
            heads=heads,
            head_dim=inner // heads,
            groups=config.count(groups_field),
            state_size=config.count("mamba_d_state"),
            columns=config.count("mamba_d_conv") + extra,
        )

    return states


def _nemotron_states(config: ConfigFields, extra: int) -> tuple[State, ...]:
    return mamba2(
        heads=config.count("mamba_num_heads"),
        head_dim=config.count("mamba_head_dim"),
        groups=config.count("n_groups"),
        state_size=config.count("ssm_state_size"),
        columns=config.count("conv_kernel") + extra,
    )


def _double_width(config: ConfigFields) -> FullAttention:
    """Zamba's shared attention sees the hidden state beside the embedding: twice as wide."""
    heads = config.count("num_attention_heads")
    kv_heads = config.optional_count("num_key_value_heads") or heads
    own = config.optional_count("head_dim") if config.model_type == "zamba" else None
    head_dim = own or 2 * config.count("hidden_size") // heads
    return FullAttention(kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "jamba": Recipe(_by(_periodic), _mamba1_states),
        "zamba": Recipe(_by(_zamba_kinds), _mamba1_states, _double_width),
        "zamba2": Recipe(
            _by(_zamba2_kinds), _mamba2_states("n_mamba_heads", "mamba_ngroups"), _double_width
        ),
        "bamba": Recipe(_by(_listed_indices), _mamba2_states("mamba_n_heads", "mamba_n_groups")),
        "granitemoehybrid": Recipe(
            _by(all_of(LINEAR)), _mamba2_states("mamba_n_heads", "mamba_n_groups")
        ),
        "falcon_h1": Recipe(_by(all_of(HYBRID)), _mamba2_states("mamba_n_heads", "mamba_n_groups")),
        "nemotron_h": Recipe(_nemotron_kinds, _nemotron_states),
    }
)

MODEL_TYPES = frozenset(RECIPES)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns of each convolution."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    recipe = RECIPES[config.model_type]
    kinds = recipe.kinds(config)

    def mamba() -> Layer:
        return state_layer(recipe.states(config, extra_columns))

    return build_layers(
        config,
        kinds,
        {
            FULL: lambda: recipe.attention(config),
            LINEAR: mamba,
            HYBRID: lambda: Combined(kind=HYBRID, members=(recipe.attention(config), mamba())),
            "moe": lambda: NoCache(reason="MoE"),
            "mlp": lambda: NoCache(reason="MLP"),
        },
    )
