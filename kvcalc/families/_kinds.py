"""Which kind each layer is: what `layer_types` lists, else a rule of the model type.

Kinds are named as in transformers' `layer_types`; older names of the same kinds are taken, too.
"""

from collections.abc import Callable, Mapping, Sequence

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families._heads import num_layers
from kvcalc.layers import Layer
from kvcalc.units import shown

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
LINEAR = "linear_attention"
INDEXED = "indexed_attention"
CONVOLUTION = "conv"
HYBRID = "hybrid"
HYBRID_SLIDING = "hybrid_sliding"

_SHORT = {FULL: "full", INDEXED: "indexed"}

Rule = Callable[[ConfigFields, int], Sequence[str]]
"""From a config without `layer_types` and its number of layers to the kind of each."""

_OTHER_NAMES = {
    "attention": FULL,
    "mamba": LINEAR,
    "deepseek_sparse_attention": INDEXED,
    "qwen_sparse_attention": INDEXED,
}


def layer_kinds(config: ConfigFields, rule: Rule, *, key: str = "layer_types") -> tuple[str, ...]:
    """The kind of each decoder layer; ConfigError when a list has another length than the model."""
    listed = config.names(key)
    if listed is None and key != "layer_types":
        listed = config.names("layer_types")
    if listed is not None:
        count = num_layers(config)
        if len(listed) != count:
            msg = f"config lists {len(listed)} {key} for {count} num_hidden_layers"
            raise ConfigError(msg)
        return tuple(_OTHER_NAMES.get(kind, kind) for kind in listed)
    return tuple(rule(config, num_layers(config)))


def build_layers(
    config: ConfigFields, kinds: Sequence[str], builders: Mapping[str, Callable[[], Layer]]
) -> tuple[Layer, ...]:
    """The layer of each kind, built once; UnsupportedError for a kind that has no builder."""
    built: dict[str, Layer] = {}
    for kind in kinds:
        if kind in built:
            continue
        if kind not in builders:
            msg = (
                f"model_type {config.model_type!r} with layers of kind {shown(kind)} is not "
                "covered; deciding field: layer_types"
            )
            raise UnsupportedError(msg)
        built[kind] = builders[kind]()
    return tuple(built[kind] for kind in kinds)


def all_of(kind: str) -> Rule:
    """Every layer is of this kind."""

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        del config
        return (kind,) * count

    return rule


def every(
    period: int,
    *,
    at: int = -1,
    one: str = FULL,
    others: str = SLIDING,
    field: str = "",
    always: Callable[[int, int], bool] | None = None,
) -> Rule:
    """One layer of every `period` is of kind `one`, the `others` not: the one at place `at` of
    each stretch (-1: its last).

    `field` holds the period where a config gives it; `always(index, count)` are of kind `one` in
    any case.
    """

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        length = config.optional_count(field) if field else None
        if length is None:
            length = period
            config.by_rule("layer_types", f"1 {_SHORT.get(one, one)} in {period} layers")
        place = at % length
        return [
            one if index % length == place or (always and always(index, count)) else others
            for index in range(count)
        ]

    return rule
