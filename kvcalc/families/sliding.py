"""Sliding windows, in all layers or alternating with full attention.

Mistral 7B (arXiv:2310.06825, section 2), Gemma 2 (arXiv:2408.00118, section 2), Gemma 3
(arXiv:2503.19786, section 2), gpt-oss (arXiv:2508.10925, section 2). Which layers slide is decided
by `layer_types` where a config has it, else by a rule of the model type, as in the
`configuration_*.py` of transformers 5.23.0.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families._heads import kv_rows, num_layers
from kvcalc.layers import FullAttention, Layer, SlidingAttention
from kvcalc.units import shown

SOURCE = "full layers keep every token, window layers min(tokens, window) (arXiv:2310.06825)"

UNDERSTANDS = frozenset({"layer_types", "sliding_window"})

Rule = Callable[[ConfigFields, int], tuple[bool, ...]]
"""From a config and its number of layers to which of them slide."""


def _all_layers(config: ConfigFields, count: int) -> tuple[bool, ...]:
    """Every layer slides as soon as a window is set; these types have no `layer_types`."""
    if _listed(config) is not None:
        msg = (
            f"model_type {config.model_type!r} slides in all layers or none, but this config has "
            "layer_types; deciding fields: model_type, layer_types"
        )
        raise UnsupportedError(msg)
    return (config.get("sliding_window") is not None,) * count


def _full_every(period: int, *, pattern_field: str = "") -> Rule:
    """Every `period`-th layer is full, unless `layer_types` or the pattern field says otherwise."""

    def rule(config: ConfigFields, count: int) -> tuple[bool, ...]:
        listed = _listed(config)
        if listed is not None:
            return listed
        every = config.optional_count(pattern_field) if pattern_field else None
        if every is None:
            every = period
            config.by_rule("layer_types", f"1 full in {period} layers")
        return tuple((index + 1) % every != 0 for index in range(count))

    return rule


def _switched(slides: Callable[[int, int], bool]) -> Rule:
    """Nothing slides unless `use_sliding_window`; then what `layer_types` lists, else
    `slides(index, max_window_layers)`.
    """

    def rule(config: ConfigFields, count: int) -> tuple[bool, ...]:
        listed = _listed(config)
        if not config.flag("use_sliding_window"):
            if listed is not None and any(listed):
                msg = "config lists sliding_attention in layer_types, but use_sliding_window is off"
                raise ConfigError(msg)
            return (False,) * count
        if listed is not None:
            return listed
        first = config.get("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            msg = f"config field max_window_layers is {shown(first)}, not a whole number"
            raise ConfigError(msg)
        has_window = config.get("sliding_window") is not None
        return tuple(has_window and slides(index, first) for index in range(count))

    return rule


def _switched_all(config: ConfigFields, count: int) -> tuple[bool, ...]:
    """All layers slide when `use_sliding_window` is on; the class has no `max_window_layers`."""
    slides = _all_layers(config, count)
    return slides if config.flag("use_sliding_window") else (False,) * count


def _listed(config: ConfigFields) -> tuple[bool, ...] | None:
    kinds = config.names("layer_types")
    if kinds is None:
        return None
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        msg = (
            f"model_type {config.model_type!r} with layers of kind {shown(unknown[0])} is not "
            "covered; deciding field: layer_types"
        )
        raise UnsupportedError(msg)
    return tuple(kind == "sliding_attention" for kind in kinds)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "mistral": _all_layers,
        "mixtral": _all_layers,
        "ministral3": _all_layers,
        "phi3": _all_layers,
        "phimoe": _all_layers,
        "starcoder2": _all_layers,
        "gemma2": _full_every(2),
        "gpt_oss": _full_every(2),
        "olmo3": _full_every(4),
        "cohere2": _full_every(4, pattern_field="sliding_window_pattern"),
        "gemma3_text": _full_every(6, pattern_field="sliding_window_pattern"),
        "qwen2": _switched(lambda index, first: index >= first),
        "qwen3": _switched(lambda index, first: index >= first),
        "qwen2_moe": _switched(lambda index, first: index % 2 == 0 and index < first),
        "qwen3_moe": _switched_all,
    }
)

MODEL_TYPES = frozenset(RULES)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """A window layer or a full layer in each place, with the same heads."""
    count = num_layers(config)
    slides = RULES[config.model_type](config, count)
    heads, key_dim, value_dim = kv_rows(config)
    full = FullAttention(kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    if not any(slides):
        return (full,) * count
    window = SlidingAttention(
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=config.count("sliding_window"),
    )
    return tuple(window if slide else full for slide in slides)
