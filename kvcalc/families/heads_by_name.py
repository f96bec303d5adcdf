"""Full attention whose heads are said in fields of their own: Falcon, GPT-BigCode, MPT, DBRX,
JetMoE, MiMo-V2, GPT-Neo and HRM.

Modeling files of transformers 5.23.0. Where transformers stores something else than the
architecture requires (Falcon's new decoder broadcasts K and V to all heads before it caches them,
GPT-Neo keeps every token of its local layers), both are given.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.families._heads import full_attention, multi_head, repeat, width_of_a_head, windowed
from kvcalc.families._kinds import FULL, SLIDING, build_layers, layer_kinds
from kvcalc.layers import FullAttention, Layer, SlidingAttention

SOURCE = "K and V of every token and KV head, heads as the type's own fields say"

UNDERSTANDS = frozenset(
    """
    attention_chunk_size attn_config hybrid_layer_pattern layer_types multi_query sliding_window
    swa_num_key_value_heads
    """.split()
)
"""MiMo's published config has a chunk size equal to its window."""

Build = Callable[[ConfigFields], tuple[Layer, ...]]


def _with_kv_heads(config: ConfigFields, kv_heads: int) -> tuple[Layer, ...]:
    width = width_of_a_head(config, config.count("num_attention_heads"))
    return repeat(config, FullAttention(kv_heads=kv_heads, key_dim=width, value_dim=width))


def _falcon(config: ConfigFields) -> tuple[Layer, ...]:
    """`num_kv_heads` in the new decoder; in the old one a single head with `multi_query`."""
    heads = config.count("num_attention_heads")
    if not config.flag("new_decoder_architecture"):
        return _with_kv_heads(config, 1 if config.flag("multi_query") else heads)
    return _with_kv_heads(config, config.optional_count("num_kv_heads") or heads)


def _falcon_broadcast(config: ConfigFields) -> tuple[Layer, ...]:
    if config.flag("new_decoder_architecture"):
        return _with_kv_heads(config, config.count("num_attention_heads"))
    return _falcon(config)


def _bigcode(config: ConfigFields) -> tuple[Layer, ...]:
    heads = config.count("num_attention_heads")
    return _with_kv_heads(config, 1 if config.flag("multi_query") else heads)


def _dbrx(config: ConfigFields) -> tuple[Layer, ...]:
    attention = config.nested("attn_config")
    return _with_kv_heads(config, (attention.optional_count("kv_n_heads") or 1) if attention else 1)


def _jetmoe(config: ConfigFields) -> tuple[Layer, ...]:
    width, heads = config.count("kv_channels"), config.count("num_key_value_heads")
    return repeat(config, FullAttention(kv_heads=heads, key_dim=width, value_dim=width))


def _mimo(config: ConfigFields) -> tuple[Layer, ...]:
    """Window layers have KV heads of their own; values are narrower than keys."""

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        pattern = config.numbers("hybrid_layer_pattern")
        if pattern is None:
            return [FULL if index == 0 or index % 6 == 5 else SLIDING for index in range(count)]
        if len(pattern) != count:
            raise config.wrong("hybrid_layer_pattern", pattern, f"a list of {count} numbers")
        return [SLIDING if slides else FULL for slides in pattern]

    full = full_attention(config)
    window_heads = 2 * full.kv_heads  # so in the modeling file, whatever the config
    stated = config.optional_count("swa_num_key_value_heads")
    if stated not in (None, window_heads):
        raise config.wrong("swa_num_key_value_heads", stated, f"{window_heads}, twice the others")
    value_dim = config.optional_count("v_head_dim") or full.value_dim

    def window() -> Layer:
        # The hub's name counts the tokens before the query, MiMoV2FlashConfig adds it.
        before = config.optional_count("sliding_window_size")
        return SlidingAttention(
            kv_heads=window_heads,
            key_dim=full.key_dim,
            value_dim=value_dim,
            window=before + 1 if before else config.count("sliding_window"),
        )

    return build_layers(
        config,
        layer_kinds(config, rule),
        {
            FULL: lambda: FullAttention(
                kv_heads=full.kv_heads, key_dim=full.key_dim, value_dim=value_dim
            ),
            SLIDING: window,
        },
    )


def _neo(config: ConfigFields) -> tuple[Layer, ...]:
    """`attention_types` is [[[kinds], times], …]; its local layers attend to a window."""
    full = multi_head(config)
    kinds = _neo_kinds(config)
    window = windowed(full, config.count("window_size"))
    return tuple(window if kind == "local" else full for kind in kinds)


def _neo_kinds(config: ConfigFields) -> Sequence[str]:
    count = config.count("num_hidden_layers", most=MAX_LAYERS)
    groups = config.get("attention_types")
    if groups is None:
        groups = [[["global", "local"], count // 2]]
        config.by_rule("attention_types", groups)
    kinds: list[str] = []
    try:
        for names, times in groups:
            if not isinstance(times, int) or times * len(names) > MAX_LAYERS:
                raise config.wrong("attention_types", groups, "a list of [[kinds], times]")
            kinds += list(names) * times
    except (TypeError, ValueError):
        raise config.wrong("attention_types", groups, "a list of [[kinds], times]") from None
    if len(kinds) != count or not {str(kind) for kind in kinds} <= {"global", "local"}:
        msg = f"config has attention_types for {len(kinds)} layers, and {count} num_layers"
        raise ConfigError(msg)
    return kinds


def _every_token(config: ConfigFields) -> tuple[Layer, ...]:
    return repeat(config, multi_head(config))


def _hrm(config: ConfigFields) -> tuple[Layer, ...]:
    """The stack is run `H_cycles` × (`L_cycles` + 1) times, each with a cache of its own."""
    heads = config.count("num_attention_heads")
    width = config.optional_count("head_dim") or width_of_a_head(config, heads)
    count = config.count("num_hidden_layers", most=MAX_LAYERS)
    if config.optional_count("num_layers_per_stack") is None:
        count *= config.count("H_cycles") * (config.count("L_cycles") + 1)
    if count > MAX_LAYERS:
        raise config.wrong("num_hidden_layers", count, f"at most {MAX_LAYERS:,} in all cycles")
    return (FullAttention(kv_heads=heads, key_dim=width, value_dim=width),) * count


BUILD: Mapping[str, Build] = MappingProxyType(
    {
        "falcon": _falcon,
        "gpt_bigcode": _bigcode,
        "mpt": _every_token,
        "dbrx": _dbrx,
        "jetmoe": _jetmoe,
        "mimo_v2_flash": _mimo,
        "gpt_neo": _neo,
        "hrm_text": _hrm,
    }
)

IN_TRANSFORMERS: Mapping[str, Build] = MappingProxyType(
    {"falcon": _falcon_broadcast, "gpt_neo": _every_token}
)

MODEL_TYPES = frozenset(BUILD)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What the architecture must keep."""
    return BUILD[config.model_type](config)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers stores."""
    return IN_TRANSFORMERS.get(config.model_type, layers)(config)
