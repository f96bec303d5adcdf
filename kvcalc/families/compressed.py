"""Compressed attention: DeepSeek-V4 (its report, section 2.3; modeling_deepseek_v4.py,
transformers 5.23.0).

Every layer keeps a window of shared K = V rows. Compressed layers add an entry for each 4 tokens
(with overlapping stretches and an index key) or 128 tokens, given as `compress_ratios`,
`compress_rates` or the names in `layer_types`.
"""

from collections.abc import Mapping, Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import num_layers
from kvcalc.families._kinds import SLIDING, build_layers
from kvcalc.layers import Layer, SlidingAttention
from kvcalc.layers.compressed import CompressedAttention

SOURCE = "a window, and an entry for each 4 or 128 tokens (modeling_deepseek_v4.py 5.23.0)"

MODEL_TYPES = frozenset({"deepseek_ref", "deepseek_v4"})

UNDERSTANDS = frozenset({"layer_types", "sliding_window", "index_head_dim", "compress_rates"})

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
RATES = {CSA: 4, HCA: 128}
"""Tokens of an entry unless a config says otherwise."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept."""
    return _layers(config, in_transformers=False)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Transformers keeps K and V apart in plain window layers, and drained stretches a while."""
    return _layers(config, in_transformers=True)


def _layers(config: ConfigFields, *, in_transformers: bool) -> tuple[Layer, ...]:
    head_dim = config.count("head_dim")
    window = config.count("sliding_window")
    rates = _rates(config)

    def compressed(kind: str) -> Layer:
        indexed = kind == CSA
        return CompressedAttention(
            kind=kind,
            entry_dim=head_dim,
            index_dim=config.count("index_head_dim") if indexed else 0,
            rate=rates[kind],
            window=window,
            series=2 if indexed else 1,
            keeps_drained=in_transformers,
        )

    return build_layers(
        config,
        _kinds(config),
        {
            SLIDING: lambda: SlidingAttention(
                kv_heads=1,
                key_dim=head_dim,
                value_dim=head_dim if in_transformers else 0,
                window=window,
            ),
            CSA: lambda: compressed(CSA),
            HCA: lambda: compressed(HCA),
        },
    )


def _rates(config: ConfigFields) -> Mapping[str, int]:
    given = config.nested("compress_rates")
    own = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
    return {
        kind: config.optional_count(own[kind])
        or (given.optional_count(kind) if given else None)
        or rate
        for kind, rate in RATES.items()
    }


def _kinds(config: ConfigFields) -> Sequence[str]:
    """Lists may be longer than the model: they go on with its multi-token-prediction layers."""
    count = num_layers(config)
    kinds: Sequence[str] | None = config.names("layer_types")
    ratios = config.numbers("compress_ratios")
    if kinds is None and ratios is not None:
        names = {0: SLIDING, **{rate: kind for kind, rate in RATES.items()}}
        if not set(ratios) <= names.keys():
            raise config.wrong("compress_ratios", ratios, "a list of 0, 4 and 128")
        kinds = [names[ratio] for ratio in ratios]
    if kinds is None:
        config.by_rule("layer_types", "two heavily compressed, then alternating")
        return ([HCA] * 2 + [CSA if index % 2 else HCA for index in range(count)])[:count]
    if len(kinds) < count:
        raise config.wrong("layer_types", list(kinds), f"a list of {count} kinds")
    return kinds[:count]
