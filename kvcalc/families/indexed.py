"""Latent attention with an indexer: DeepSeek-V3.2's sparse attention (arXiv:2512.02556, section 2)
and GLM-5.

Beside its latent a layer that owns an indexer keeps an index key for each token; layers that share
an earlier layer's selection keep none. DeepSeek's and GLM's index keys are kept in FP8 with a
scale for 128 values, in transformers 5.23.0 in the model's dtype.
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError
from kvcalc.families._heads import num_layers
from kvcalc.families._kinds import INDEXED, all_of, layer_kinds
from kvcalc.families._latent import latent
from kvcalc.layers import Layer
from kvcalc.layers.mixed import Combined, IndexKeys

SOURCE = "a latent a token and layer, and an index key where a layer has an indexer (2512.02556)"

MODEL_TYPES = frozenset({"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"})

UNDERSTANDS = frozenset({"kv_lora_rank", "index_head_dim", "layer_types"})

_FP8_INDEX = frozenset({"deepseek_v32", "glm_moe_dsa"})
"""Types whose authors keep index keys in FP8."""

_ALL_OWN = frozenset({"axk2", "deepseek_v32"})
"""Types without sharing: every layer has an indexer."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """A latent in each layer, and an index key in those that own an indexer."""
    return _layers(config, IndexKeys.FP8_SCALED if config.model_type in _FP8_INDEX else "")


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Index keys in the model's dtype."""
    return _layers(config, "")


def _layers(config: ConfigFields, storage: str) -> tuple[Layer, ...]:
    kinds = layer_kinds(config, all_of(INDEXED))
    if set(kinds) != {INDEXED}:
        raise config.wrong("layer_types", kinds, f"{INDEXED} in every layer")
    plain = latent(config)
    keys = IndexKeys(dim=config.count("index_head_dim"), storage=storage)
    indexed = Combined(kind=INDEXED, members=(plain, keys))
    return tuple(indexed if owns else plain for owns in owners(config))


def owners(config: ConfigFields) -> Sequence[bool]:
    """Which layers have an indexer: `indexer_types`, a pattern of F and S, or a period."""
    count = num_layers(config)
    if config.model_type in _ALL_OWN:
        return (True,) * count
    types = config.names("indexer_types")
    if types is None and config.model_type != "hy_v4":
        pattern = config.get("index_topk_pattern")
        if isinstance(pattern, str):
            types = tuple({"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern)
        elif pattern is not None:
            types = config.names("index_topk_pattern")
    if types is None:
        return _periodic(config, count)
    if len(types) != count or set(types) - {"full", "shared"}:
        msg = f"config must list full or shared as indexer_types for each of its {count} layers"
        raise ConfigError(msg)
    return [kind == "full" for kind in types]


def _periodic(config: ConfigFields, count: int) -> Sequence[bool]:
    if config.model_type == "hy_v4":
        config.by_rule("indexer_types", "the first layer, then 1 full in 4")
        return [index == 0 or (index - 1) % 4 == 0 for index in range(count)]
    period = max(config.number("index_topk_freq", default=1), 1)
    offset = config.number("index_skip_topk_offset", default=2)
    return [max(index - offset + 1, 0) % period == 0 for index in range(count)]
