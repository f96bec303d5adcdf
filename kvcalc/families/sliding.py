"""Sliding windows, in all layers or alternating with full attention.

Mistral 7B (arXiv:2310.06825, section 2), Gemma 2 (arXiv:2408.00118, section 2), Gemma 3
(arXiv:2503.19786, section 2), gpt-oss (arXiv:2508.10925, section 2). Which layers slide is decided
by `layer_types` where a config has it, else by a rule of the model type, as in the
`configuration_*.py` of transformers 5.23.0.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families._heads import full_attention, width_of_a_head, windowed
from kvcalc.families._kinds import FULL, SLIDING, Rule, all_of, build_layers, every, layer_kinds
from kvcalc.layers import FullAttention, Layer

SOURCE = "full layers keep every token, window layers min(tokens, window) (arXiv:2310.06825)"

UNDERSTANDS = frozenset(
    {"layer_types", "sliding_window", "num_attention_heads_per_layer", "per_layer_config"}
)
"""Per layer only the query heads of Laguna and Step differ, which no cache keeps."""


def _slide_if(slides: Callable[[int, ConfigFields], bool]) -> Rule:
    """The layers for which `slides(index, config)` holds, once a window is set."""

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        if config.get("sliding_window") is None:
            return (FULL,) * count
        return [SLIDING if slides(index, config) else FULL for index in range(count)]

    return rule


def _switched(slides: Callable[[int, ConfigFields], bool]) -> Rule:
    """Nothing slides unless `use_sliding_window`."""

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        on = config.flag("use_sliding_window")
        return _slide_if(slides)(config, count) if on else (FULL,) * count

    return rule


def _from_max_window_layers(index: int, config: ConfigFields) -> bool:
    return index >= config.number("max_window_layers")


def _even_below_max_window_layers(index: int, config: ConfigFields) -> bool:
    return index % 2 == 0 and index < config.number("max_window_layers")


def _without_rope(index: int, config: ConfigFields) -> bool:
    with_rope = config.numbers("no_rope_layers")
    if with_rope is not None:
        return index < len(with_rope) and not with_rope[index]
    return (index + 1) % config.count("no_rope_layer_interval") == 0


def _lettered(config: ConfigFields, count: int) -> Sequence[str]:
    """`sliding_window_pattern` is a period, or its letters: L local, G global (EXAONE)."""
    pattern = config.get("sliding_window_pattern")
    if config.get("sliding_window") is None:
        return (FULL,) * count
    if not isinstance(pattern, str):
        return every(config.count("sliding_window_pattern"))(config, count)
    if not pattern or set(pattern) - set("LG"):
        raise config.wrong("sliding_window_pattern", pattern, "a period or letters L and G")
    return [SLIDING if pattern[index % len(pattern)] == "L" else FULL for index in range(count)]


def _from_the_last(config: ConfigFields, count: int) -> Sequence[str]:
    """Every fourth layer is full, counted backward from the last (Muse)."""
    del config
    return [FULL if (count - 1 - index) % 4 == 0 else SLIDING for index in range(count)]


def _dense_first(config: ConfigFields, count: int) -> Sequence[str]:
    """The first dense layers follow a pattern of their own (Cohere 2 MoE)."""
    first = min(config.number("first_k_dense_replace"), count)
    prefix = config.optional_count("prefix_dense_sliding_window_pattern") or 1
    period = config.count("sliding_window_pattern")
    return [FULL if (index + 1) % prefix == 0 else SLIDING for index in range(first)] + [
        FULL if (index + 1) % period == 0 else SLIDING for index in range(count - first)
    ]


_ALWAYS = _slide_if(lambda _index, _config: True)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(
            "doge mistral mixtral moshi ministral3 phi3 phi3_v phi4_multimodal phimoe "
            "starcoder2".split(),
            _ALWAYS,
        ),
        **dict.fromkeys(["ministral", "voxtral_realtime_text"], _ALWAYS),
        **dict.fromkeys(["cohere_compass_text", "laguna", "mellum", "step3p5"], all_of(FULL)),
        **dict.fromkeys(["gemma2", "gpt_oss", "vaultgemma"], every(2)),
        **dict.fromkeys(["exaone4", "exaone4_5_text", "exaone_moe"], _lettered),
        **dict.fromkeys(["granite_swa", "granitemoe_swa", "cwm"], every(4, at=0)),
        **dict.fromkeys(["muse_glimmer_text", "muse_spark_text"], _from_the_last),
        **dict.fromkeys(["dots1", "qwen3_omni_moe_text"], _slide_if(_from_max_window_layers)),
        **dict.fromkeys(
            """
            deepseek_ocr2_text mimo qwen2 qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text qwen3
            """.split(),
            _switched(_from_max_window_layers),
        ),
        "afmoe": every(4, field="global_attn_every_n_layers"),
        "beam": every(6, always=lambda index, count: index == count - 1),
        "cohere2": every(4, field="sliding_window_pattern"),
        "cohere2_moe": _dense_first,
        "flint": every(4, at=1, always=lambda index, count: index < 2 or index == count - 1),
        "gemma3_text": every(6, field="sliding_window_pattern"),
        "kolibri1": every(5),
        "olmo3": every(4),
        "qwen2_moe": _switched(_even_below_max_window_layers),
        "qwen3_moe": _switched(lambda _index, _config: True),
        "qwen3_vl_moe_text": all_of(FULL),
        "smollm3": _switched(_without_rope),
    }
)

MODEL_TYPES = frozenset(RULES)

SWITCHED = frozenset(
    """
    deepseek_ocr2_text qwen2 qwen2_5_omni_text qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3
    """.split()
)
"""Types whose classes forget the window unless `use_sliding_window` is on."""

UNLISTED = frozenset(
    "doge mistral mixtral moshi ministral3 phi3 phi4_multimodal phimoe starcoder2 qwen3_moe "
    "qwen3_vl_moe_text voxtral_realtime_text".split()
)
"""Types whose classes know no `layer_types`: all layers slide or none."""


HIDDEN_PER_HEAD = frozenset({"deepseek_ocr2_text"})
"""Types whose heads are hidden_size / num_attention_heads wide, whatever `head_dim` says."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """A window layer or a full layer in each place, with the same heads."""
    listed = config.given("layer_types")
    if listed is not None and config.model_type in UNLISTED:
        msg = (
            f"model_type {config.model_type!r} slides in all layers or none, but this config has "
            "layer_types; deciding fields: model_type, layer_types"
        )
        raise UnsupportedError(msg)
    kinds = layer_kinds(config, RULES[config.model_type])
    if SLIDING in kinds and config.model_type in SWITCHED and not config.flag("use_sliding_window"):
        msg = "config lists sliding_attention in layer_types, but use_sliding_window is off"
        raise ConfigError(msg)
    full = full_attention(config)
    if config.model_type in HIDDEN_PER_HEAD:
        width = width_of_a_head(config, config.count("num_attention_heads"))
        full = FullAttention(kv_heads=full.kv_heads, key_dim=width, value_dim=width)
    return build_layers(
        config,
        kinds,
        {
            FULL: lambda: full,
            SLIDING: lambda: windowed(full, config.count("sliding_window")),
        },
    )
